"""A batch with an adapter for each example equals separate runs, and peft's mixed batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuned_models import forms, hub_model, logits, path_of, peft_numbers

from research.decode.generate import generate
from research.decode.sampling import Sampling
from research.models import decoder
from research.models.families.llama import llama
from research.paths import map_named, named_leaves
from research.weights import bank, base, lora, merge

MODEL = decoder.Decoder(llama(40, 2, 16, 4, 2, 24, tied=True, init_std=0.3))
TOKENS = jnp.arange(40, dtype=jnp.int32).reshape(4, 10)
RULES = (r".*/kernel|embed/table", r".*/(q|down)/kernel")
CHOSEN = [1, -1, 0, 1]


def filled(params, key, rank, alpha, rule):
    tuned = lora.add(params, rule, key, rank=rank, alpha=alpha)

    def of(name, leaf):
        if not name.endswith(("/a", "/b")):
            return leaf
        return 0.2 * jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape)

    return map_named(of, tuned)


@pytest.fixture
def params(key):
    return decoder.init(MODEL, key)


@pytest.fixture
def adapters(params):
    """Of other ranks, scales and places."""
    how = zip((3, 5), (6, 2), RULES, strict=True)
    return [filled(params, jax.random.key(n), *given) for n, given in enumerate(how)]


def node(params, name="attention/q"):
    return dict(named_leaves(params, is_leaf=base.is_weight))[f"stack_0/block_0/{name}/kernel"]


def test_a_mixed_batch_equals_peft():
    numbers = peft_numbers("combine")
    model, base_params, prompts = hub_model("tiny_llama/gqa")
    names, scales = ["first", "second", "wide"], [2, 0.75, 1]
    adapters = [
        with_factors(base_params, numbers, name, scale)
        for name, scale in zip(names, scales, strict=True)
    ]
    ids = [1, -1, 0, 2, 0]  # second, __base__, first, wide, first
    tokens = jnp.tile(jnp.asarray(prompts[0]), (5, 1))
    ours = logits(model, bank.choose(bank.stack(adapters), ids), tokens)
    np.testing.assert_allclose(ours, numbers["mixed.logits"], rtol=0, atol=2e-5)
    assert np.abs(ours[0] - ours[1]).max() > 0.1


def with_factors(params, numbers, adapter, scale):
    """The model with peft's factors of one adapter."""
    found = {
        path_of(n.split(".")[2]): n.split(".")[2] for n in numbers if n.startswith(f"{adapter}.")
    }

    def of(path, w):
        if path not in found:
            return w
        a, b = (
            jnp.stack([numbers[f"{adapter}.{layer}.{found[path]}.{k}"].T for layer in range(2)])
            for k in "AB"
        )
        return lora.LoRA(w, a, b, scale)

    return map_named(of, params)


def test_each_example_equals_a_run_of_its_own(params, adapters):
    """Every matrix, the table and the head tied to it among them."""
    got = logits(MODEL, bank.choose(bank.stack(adapters), CHOSEN), TOKENS)
    alone = [logits(MODEL, p, TOKENS) for p in (*adapters, params)]  # -1 is the last: the base
    for row, adapter in enumerate(CHOSEN):
        np.testing.assert_allclose(got[row], alone[adapter][row], atol=2e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1 < np.abs(alone[0] - alone[2]).max()


def test_all_forms_of_a_model_agree(adapters):
    chosen = bank.choose(bank.stack(adapters), CHOSEN)
    found = forms(MODEL, chosen, TOKENS)
    for form in ("loop", "apart", "remat"):
        np.testing.assert_allclose(found[form], found["scan"], atol=1e-5, err_msg=form)


def test_greedy_generation_equals_separate_runs(params, adapters, key):
    """Ragged prompts in one batch; the ids are chosen after the layers have been put apart, too."""
    prompts, sampling = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3], [3, 1, 4]], Sampling(max_tokens=6)
    many = bank.stack(adapters)
    got = generate(MODEL, bank.choose(many, CHOSEN), prompts, key, sampling)
    alone = [generate(MODEL, p, prompts, key, sampling) for p in (*adapters, params)]
    want = [alone[adapter].rows()[row] for row, adapter in enumerate(CHOSEN)]
    assert got.rows() == want
    for row, adapter in enumerate(CHOSEN):
        log_probs = [run.log_probs[row] for run in alone]
        np.testing.assert_allclose(got.log_probs[row], log_probs[adapter], atol=1e-4)
        assert np.abs(log_probs[adapter] - log_probs[adapter - 1]).max() > 1e-3
    apart = bank.choose(decoder.unstack(many), CHOSEN)
    assert generate(MODEL, apart, prompts, key, sampling).rows() == want


def test_gradients_reach_the_factors_of_who_was_chosen(adapters):
    """As those of the adapter alone on its rows; none for an adapter that no row has."""

    def loss(params, tokens):
        return (MODEL.apply({"params": params}, tokens) ** 2).sum()

    chosen = bank.choose(bank.stack(adapters), [1, -1, 1, 1])
    found = node(jax.jit(jax.grad(loss, allow_int=True))(chosen, TOKENS))
    rows = TOKENS[jnp.array([0, 2, 3])]
    want = node(jax.jit(jax.grad(loss))(adapters[1], rows))
    scale = np.abs(want.a).max()
    np.testing.assert_allclose(found.a[:, 1], want.a, atol=1e-5 * scale)
    np.testing.assert_allclose(found.b[:, 1], want.b, atol=1e-5 * np.abs(want.b).max())
    assert scale > 1e-3 and not np.any(found.a[:, 0]) and not np.any(found.b[:, 0])


def test_pick_is_the_inverse_of_stack(adapters):
    many = bank.stack(adapters)
    for number, adapter in enumerate(adapters):
        again, want = merge(bank.pick(many, number)), merge(adapter)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), again, want)
    assert node(bank.pick(many, 0)).a.shape == (2, 16, 5)  # the widest rank
    with pytest.raises(ValueError, match=r"has adapters 0..1, not 2"):
        bank.pick(many, 2)


def test_axes_follow_the_matrix(adapters):
    chosen = bank.choose(bank.stack(adapters), CHOSEN)
    q = node(base.leaf_axes(chosen, decoder.axes(MODEL)))
    assert (q.base, q.ids) == (("layers", "embed", "heads"), ("layers", None))
    assert q.a == ("layers", None, "embed", "rank")
    assert q.b == ("layers", None, "rank", "heads")


def test_rows_that_are_no_whole_examples_are_refused(adapters):
    chosen = bank.choose(bank.stack(adapters), [0, 1, 1])
    with pytest.raises(ValueError, match=r"^40 rows are not those of 3 examples"):
        MODEL.apply({"params": chosen}, TOKENS)


def test_models_of_other_bases_are_refused_by_name(params, adapters):
    def change(name):
        return map_named(lambda n, x: x + 1 if n == name else x, adapters[1])

    name = "stack_0/block_0/ffn/up/kernel"
    with pytest.raises(
        ValueError, match=f"models 0 and 1 do not share a base: they differ at {name}"
    ):
        bank.stack([adapters[0], change(name)])
    with pytest.raises(ValueError, match=r"they differ at final_norm/scale"):
        bank.stack([adapters[0], change("final_norm/scale")])
    more = {**params, "head": {"kernel": params["embed"]["table"].T}}
    with pytest.raises(ValueError, match=r"only one has head/kernel"):
        bank.stack([adapters[0], more])
    with pytest.raises(ValueError, match=r"no LoRA in any of the 2 models"):
        bank.stack([params, params])


def test_what_cannot_be_chosen_or_merged(params, adapters):
    many = bank.stack(adapters)
    with pytest.raises(ValueError, match=r"\[0, 2\]: there are adapters 0..1, and -1 for none"):
        bank.choose(many, [0, 2])
    with pytest.raises(ValueError, match=r"ids: expected one for each example"):
        bank.choose(many, [[0, 1]])
    with pytest.raises(ValueError, match=r"no bank to choose from"):
        bank.choose(params, [0])
    with pytest.raises(ValueError, match=r"multiplies after `bank.choose`"):
        MODEL.apply({"params": many}, TOKENS)
    with pytest.raises(ValueError, match=r"^embed/table cannot be merged: a bank of 2 adapters"):
        merge(many)


def test_under_jit_an_id_that_is_no_adapters_is_nan(adapters):
    many = bank.stack(adapters)
    run = jax.jit(lambda ids: MODEL.apply({"params": bank.choose(many, ids)}, TOKENS))
    found = run(jnp.array([0, 2, 1, -1]))
    assert np.isnan(found[1]).all() and np.isfinite(np.delete(found, 1, axis=0)).all()
