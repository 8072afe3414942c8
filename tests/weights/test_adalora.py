"""AdaLoRA against peft's numbers and its own algebra; the allocation is in test_adalora_allocate."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adalora_reference import BASE, RECORD, triplets

from research import hub
from research.models import decoder
from research.models.families.llama import llama
from research.objectives import next_token, with_penalty
from research.paths import RuleError, named_leaves
from research.train.partition import partition
from research.weights import adalora, base, lora, merge

CONFIG = llama(40, 3, 16, 4, 2, 24, tied=True, init_std=0.3)
MODEL = decoder.Decoder(CONFIG)
ALL = r".*/kernel|embed/table"
QUERY = r".*/attention/q/kernel"
TOKENS = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)


@partial(jax.jit, static_argnames="model")
def logits(params, model=MODEL, **more):
    return model.apply({"params": params}, TOKENS, **more)


def filled(params, key):
    """Singular values that are not zero, and differ from layer to layer."""

    def of(w):
        if not adalora.is_adalora(w):
            return w
        return w.replace(e=40 * jax.random.normal(key, w.e.shape))

    return jax.tree.map(of, params, is_leaf=base.is_weight)


def query(params):
    return params["stack_0"]["block_0"]["attention"]["q"]["kernel"]


@pytest.fixture
def params(key):
    return decoder.init(MODEL, key)


@pytest.fixture
def tuned(params, key):
    return filled(adalora.add(params, ALL, key, rank=4, alpha=8), key)


@pytest.fixture(scope="module")
def peft_model():
    """The model that peft trained, with its triplets as they are at the end."""
    loaded = hub.load(BASE)
    params = adalora.add(loaded.params, r".*/(q|v)/kernel", jax.random.key(0), rank=6, alpha=12)
    attention = params["stack_0"]["block_0"]["attention"]
    for name in "qv":
        found = triplets(f"final.{name}")
        attention[name] = {"kernel": attention[name]["kernel"].replace(**found)}
    return loaded.model, params, loaded.params


def test_logits_equal_peft(peft_model):
    model, params, bare = peft_model
    prompt = RECORD["prompt"][None]
    ours, plain = (model.apply({"params": p}, prompt)[0] for p in (params, bare))
    np.testing.assert_allclose(ours, RECORD["logits"], rtol=0, atol=1e-5)
    assert np.abs(ours - plain).max() > 0.01


def test_gradients_with_the_regulariser_equal_peft(peft_model):
    model, params, _ = peft_model
    prompt = RECORD["prompt"][None]
    batch = {"tokens": prompt[:, :-1], "targets": prompt[:, 1:]}
    batch["weights"] = jnp.full(batch["targets"].shape, 1 / batch["targets"].size)
    objective = with_penalty(next_token(model), adalora.orthogonality(0.5))
    trainable, frozen = partition(params, adalora.TRAINABLE)

    def loss(trainable):
        whole = jax.tree.map(
            lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
        )
        return objective(whole, None, batch, None)[0]

    grads = jax.jit(jax.grad(loss))(trainable)["stack_0"]["block_0"]["attention"]
    for name in "qv":
        for factor, theirs in triplets(f"final_grad.{name}").items():
            assert np.abs(theirs).max() > 0.01
            ours = getattr(grads[name]["kernel"], factor)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name + factor)


def test_at_init_nothing_changes_and_only_e_has_a_gradient(params, key):
    fresh = adalora.add(params, ALL, key, rank=4, alpha=8)
    np.testing.assert_array_equal(logits(fresh), logits(params))
    grads = jax.grad(lambda p: (logits(p) ** 2).mean())(fresh)
    for name, grad in named_leaves(grads):
        if name.endswith(("/a", "/b")):
            assert not np.any(grad), name
        if name.endswith("/e"):
            assert np.all(grad), name


def test_factors_begin_normal_and_each_layer_has_its_own(params, key):
    w = query(adalora.add(params, QUERY, key, rank=16))
    assert (w.a.shape, w.e.shape, w.b.shape) == ((3, 16, 16), (3, 16), (3, 16, 16))
    for factor in (w.a, w.b):
        np.testing.assert_allclose(factor.std(), 0.02, rtol=0.1)
        assert np.abs(factor[0] - factor[1]).max() > 0.01
    assert np.abs(jnp.swapaxes(w.a, -1, -2) - w.b).max() > 0.01


def test_dense_is_the_sum_written_out(tuned):
    w = query(tuned)
    assert w.scale == 2
    for layer in range(3):
        a, e, b = (np.asarray(leaf[layer]) for leaf in (w.a, w.e, w.b))
        want = np.asarray(w.base[layer]) + 2 * sum(e[i] * np.outer(a[:, i], b[i]) for i in range(4))
        np.testing.assert_allclose(w.dense()[layer], want, atol=1e-5)


def test_merged_and_as_lora_equal_unmerged_for_every_matrix_and_the_tied_table(params, tuned):
    assert np.abs(logits(tuned) - logits(params)).max() > 0.1
    np.testing.assert_allclose(logits(merge(tuned)), logits(tuned), atol=1e-5)
    plain = adalora.to_lora(tuned)
    assert isinstance(query(plain), lora.LoRA)
    np.testing.assert_array_equal(logits(plain), logits(tuned))


def test_stands_on_another_weight(params, key):
    below = lora.add(params, QUERY, key, rank=2)
    below = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 if jax.tree_util.keystr(path).endswith(".b") else x, below
    )
    both = filled(adalora.add(below, QUERY, key, rank=4), key)
    np.testing.assert_allclose(logits(merge(both)), logits(both), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, adalora.remove(both), below)


@pytest.mark.parametrize("how", ["loop", "unstacked", "remat"])
def test_scanned_equals(how, tuned):
    """Logits and gradients, the layers run in another way."""
    options = {"loop": {"scan": False}, "unstacked": {}, "remat": {"remat": "full"}}[how]
    other = decoder.Decoder(dataclasses.replace(CONFIG, **options))
    change = decoder.unstack if how == "unstacked" else lambda tree: tree

    def energy(params, model):
        found = logits(params, model)
        return (found**2).mean(), found

    grad = jax.jit(jax.grad(energy, has_aux=True), static_argnums=1)
    (ours, found), (theirs, expected) = grad(change(tuned), other), grad(tuned, MODEL)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), ours, change(theirs)
    )


def test_dropout_touches_the_branch_only(params, key):
    fresh = adalora.add(params, r".*/kernel", key, rank=4, dropout=0.5)
    rngs = {"dropout": jax.random.key(1)}
    np.testing.assert_array_equal(logits(fresh, rngs=rngs), logits(params))
    assert np.abs(logits(filled(fresh, key), rngs=rngs) - logits(filled(fresh, key))).max() > 1e-3


def test_regulariser_by_hand(key):
    """Factors of unequal shapes and two layers count as one matrix each; norms are not squared."""
    a = jnp.stack([jnp.zeros((3, 2)), jnp.eye(3)[:, :2]])  # ‖0 - I‖ = sqrt 2, and 0
    b = jnp.stack(
        [2 * jnp.eye(2), jnp.ones((2, 2))]
    )  # ‖4I - I‖ = 3 sqrt 2, ‖[[1,2],[2,1]]‖ = sqrt 10
    w = adalora.AdaLoRA(jnp.zeros((2, 3, 2)), a, jnp.zeros((2, 2)), b, 1.0)
    value, metrics = adalora.orthogonality(0.5)({"kernel": w, "bias": a}, None, key)
    want = (2**0.5 + 0 + 3 * 2**0.5 + 10**0.5) / 4
    np.testing.assert_allclose(metrics["orthogonality"].value, want, rtol=1e-6)
    np.testing.assert_allclose(value, 0.5 * want, rtol=1e-6)
    grads = jax.grad(lambda w: adalora.orthogonality()({"kernel": w}, None, key)[0])(w)
    assert not np.any(grads.a[1])  # exactly orthogonal: 0, not nan
    assert np.all(np.isfinite(grads.b)) and np.any(grads.b[0])


def test_ranks_count_each_layer(params, key):
    tuned = adalora.add(params, QUERY + r"|embed/table", key, rank=4)
    e = jnp.array([[1.0, 0, 2, 0], [0, 0, 0, 0], [1, -1, 1e-9, 2]])
    attention = tuned["stack_0"]["block_0"]["attention"]
    attention["q"] = {"kernel": query(tuned).replace(e=e)}
    found = adalora.ranks(tuned)
    assert found.pop("embed/table") == 0
    assert {name: n.tolist() for name, n in found.items()} == {
        "stack_0/block_0/attention/q/kernel": [2, 0, 4]
    }
    apart = adalora.ranks(decoder.unstack(tuned))
    assert [n for name, n in apart.items() if name != "embed/table"] == [2, 0, 4]


def test_axes_follow_the_matrix(params, key):
    w = query(base.leaf_axes(adalora.add(params, QUERY, key), decoder.axes(MODEL)))
    assert w.base == ("layers", "embed", "heads")
    assert (w.a, w.e, w.b) == (
        ("layers", "embed", "rank"),
        ("layers", "rank"),
        ("layers", "rank", "heads"),
    )


def test_remove_gives_the_base_back(params, tuned):
    jax.tree.map(np.testing.assert_array_equal, adalora.remove(tuned), params)


def test_what_cannot_be_is_refused(params, key):
    with pytest.raises(RuleError, match=r"matches none of .* paths"):
        adalora.add(params, r".*/qproj/kernel", key)
    with pytest.raises(ValueError, match=r"stands on matrices.*final_norm/scale"):
        adalora.add(params, r"final_norm/scale", key)
    with pytest.raises(ValueError, match="rank of at least 1, not 0"):
        adalora.add(params, ALL, key, rank=0)
    with pytest.raises(ValueError, match=r"AdaLoRA needs a rank of at most \d+ for .*/q/kernel"):
        adalora.add(params, QUERY, key, rank=1000)
    with pytest.raises(ValueError, match="no AdaLoRA among the parameters"):
        adalora.orthogonality()(params, None, key)
