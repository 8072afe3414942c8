"""(IA)^3 against peft's numbers, with and without biases, and against its own algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuned_models import (
    check_only_these_train,
    forms,
    hub_model,
    logits,
    mean_nll,
    path_of,
    peft_numbers,
)

from research.decode.generate import for_decoding
from research.models import decoder
from research.models.families.llama import llama
from research.models.families.qwen import qwen
from research.paths import RuleError, map_named, named_leaves
from research.weights import base, ia3, lora, merge

MODELS = {"llama": "tiny_llama/gqa", "qwen": "tiny_qwen/tied"}  # the second has biases on q, k, v
MODEL = decoder.Decoder(llama(40, 2, 16, 4, 2, 24, tied=True, init_std=0.3))
BIASED = decoder.Decoder(qwen(40, 2, 16, 4, 2, 24, init_std=0.3))
TOKENS = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
EVERY = r".*/kernel|embed/table"


def drawn(params, key, ends=("kernel/scale", "table/scale")):
    """The leaves whose path ends so, at random: by default the vectors."""

    def of(name, leaf):
        return leaf + 0.3 * jax.random.normal(key, leaf.shape) if name.endswith(ends) else leaf

    return map_named(of, params)


def started(model, key):
    """Parameters whose norms and biases are not what they begin as."""
    return drawn(decoder.init(model, key), key, ("/scale", "/bias"))


@pytest.fixture(params=["llama", "biased"])
def case(request, key):
    model = {"llama": MODEL, "biased": BIASED}[request.param]
    return model, started(model, key)


def node_of(params, name="attention/k"):
    return dict(named_leaves(params, is_leaf=base.is_weight))[f"stack_0/block_0/{name}/kernel"]


def with_peft_vectors(params, numbers):
    def of(path, w):
        if not isinstance(w, ia3.ScaledOutput | ia3.ScaledInput):
            return w
        (module,) = {
            n.split(".")[2]
            for n in numbers
            if n.startswith("ia3.") and path_of(n.split(".")[2]) == path
        }
        return w.replace(scale=jnp.stack([numbers[f"ia3.{layer}.{module}"] for layer in range(2)]))

    return map_named(of, params, is_leaf=base.is_weight)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_peft(name):
    model, params, prompts = hub_model(MODELS[name])
    numbers = peft_numbers(f"ia3_{name}")
    tuned = with_peft_vectors(ia3.add(params), numbers)
    assert (node_of(tuned).shift is None) == (name == "llama")
    for number, ids in enumerate(prompts):
        ours = logits(model, tuned, jnp.asarray(ids)[None])[0]
        np.testing.assert_allclose(ours, numbers[f"logits.{number}"], rtol=0, atol=1e-5)
    grads = jax.jit(jax.grad(mean_nll(model, prompts)))(tuned)
    nodes = dict(named_leaves(grads, is_leaf=base.is_weight))
    theirs = {n: g for n, g in numbers.items() if n.startswith("grad.")}
    assert len(theirs) == 6
    for their_name, gradient in theirs.items():
        _, layer, module = their_name.split(".")
        assert np.abs(gradient).max() > 0.01
        ours = nodes[path_of(module)].scale[int(layer)]
        np.testing.assert_allclose(ours, gradient, rtol=0, atol=1e-5, err_msg=their_name)


def test_at_init_nothing_changes(case):
    model, params = case
    np.testing.assert_array_equal(
        logits(model, ia3.add(params), TOKENS), logits(model, params, TOKENS)
    )


def test_ia3_is_the_layer_written_out(key):
    """l * (x W + b) with the bias that the layer adds, and (l * x) W."""
    kernel, bias, scale = (
        jax.random.normal(jax.random.fold_in(key, n), shape)
        for n, shape in enumerate([(5, 4), (4,), (4,)])
    )
    x = jax.random.normal(key, (7, 5))
    layer = ia3.add({"k": {"kernel": kernel, "bias": bias}}, ".*/kernel", inputs=None)["k"]
    w = layer["kernel"].replace(scale=scale)
    want = (np.asarray(x) @ np.asarray(kernel) + np.asarray(bias)) * np.asarray(scale)
    np.testing.assert_allclose(base.matmul(x, w) + layer["bias"], want, atol=1e-5)
    inner = jax.random.normal(key, (5,))
    y = base.matmul(x, ia3.ScaledInput(kernel, inner))
    np.testing.assert_allclose(
        y, (np.asarray(x) * np.asarray(inner)) @ np.asarray(kernel), atol=1e-5
    )


def test_merged_equals_unmerged_with_and_without_biases(case, key):
    model, params = case
    tuned = drawn(ia3.add(params), key)
    merged = ia3.merge(tuned)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert np.abs(logits(model, tuned, TOKENS) - logits(model, params, TOKENS)).max() > 1e-3
    np.testing.assert_allclose(
        logits(model, merged, TOKENS), logits(model, tuned, TOKENS), atol=1e-5
    )


def test_the_general_merge_serves_layers_without_biases_and_names_one_with(key):
    tuned = drawn(ia3.add(decoder.init(MODEL, key)), key)
    np.testing.assert_array_equal(
        logits(MODEL, merge(tuned), TOKENS), logits(MODEL, ia3.merge(tuned), TOKENS)
    )
    biased = ia3.add(decoder.init(BIASED, key))
    with pytest.raises(
        ValueError, match=r"^stack_0/block_0/attention/k/kernel cannot be merged: Sc.*ia3.merge"
    ):
        merge(biased)
    jax.tree.map(np.testing.assert_array_equal, merge(ia3.merge(biased)), ia3.merge(biased))


@pytest.mark.parametrize("inputs", [None, EVERY], ids=["outputs", "inputs"])
def test_every_matrix_and_the_tied_table(key, inputs):
    params = decoder.init(MODEL, key)
    tuned = drawn(ia3.add(params, EVERY, inputs=inputs), key)
    np.testing.assert_allclose(
        logits(MODEL, merge(tuned), TOKENS), logits(MODEL, tuned, TOKENS), rtol=1e-5, atol=1e-5
    )


def test_all_forms_of_a_model_agree(key):
    tuned = drawn(ia3.add(started(BIASED, key)), key)
    want = logits(BIASED, ia3.merge(tuned), TOKENS)
    for form, found in forms(BIASED, tuned, TOKENS).items():
        np.testing.assert_allclose(found, want, atol=1e-5, err_msg=form)
    np.testing.assert_allclose(logits(BIASED, for_decoding(tuned), TOKENS), want, atol=1e-5)


def test_only_the_vectors_train(case, key):
    model, params = case
    check_only_these_train(
        model, ia3.add(params), ia3.TRAINABLE, np.asarray(TOKENS), key, "kernel/scale"
    )


def test_it_stands_on_lora_and_scales_its_branch_too(key):
    params = started(BIASED, key)
    tuned = lora.add(params, r".*/v/kernel", key)
    tuned = map_named(lambda n, x: x + 0.1 if n.endswith("kernel/b") else x, tuned)
    both = drawn(ia3.add(tuned), key)
    plain = drawn(ia3.add(merge(tuned)), key)
    np.testing.assert_allclose(
        logits(BIASED, both, TOKENS), logits(BIASED, plain, TOKENS), atol=1e-5
    )
    # There is no place under one for a branch that would not be scaled with the bias.
    with pytest.raises(ValueError, match=r"ia3.merge"):
        lora.add(ia3.add(params), r".*/v/kernel", key)


def test_axes_follow_the_matrix(key):
    tuned = ia3.add(decoder.init(BIASED, key))
    axes = base.leaf_axes(tuned, decoder.axes(BIASED))
    k, down = node_of(axes), node_of(axes, "ffn/down")
    assert (k.base, k.scale) == (("layers", "embed", "kv_heads"), ("layers", "kv_heads"))
    assert k.shift == ("layers", "kv_heads")
    assert (down.base, down.scale) == (("layers", "ffn", "embed"), ("layers", "ffn"))


def test_remove_gives_the_base_back(case, key):
    _, params = case
    jax.tree.map(np.testing.assert_array_equal, ia3.remove(drawn(ia3.add(params), key)), params)


def test_bad_rules(key):
    params = decoder.init(MODEL, key)
    with pytest.raises(RuleError, match=r"matches none of .* paths"):
        ia3.add(params, r".*/kproj/kernel")
    with pytest.raises(RuleError, match=r"matches none of .* paths"):
        ia3.add(params, inputs=r".*/down_proj/kernel")
    with pytest.raises(ValueError, match=r"\(IA\)\^3 stands on matrices .* not final_norm/scale"):
        ia3.add(params, r"final_norm/scale")
