"""BitFit: biases that were added against a model that has them, and the rules for those there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuned_models import check_only_these_train, forms, logits

from research.decode.generate import for_decoding
from research.models import decoder
from research.models.families.gpt import gpt
from research.models.families.llama import llama
from research.paths import RuleError, map_named, named_leaves, require_match
from research.weights import base, bias, lora, merge

MODEL = decoder.Decoder(llama(40, 2, 16, 4, 2, 24, init_std=0.3))
BIASED = decoder.Decoder(
    llama(40, 2, 16, 4, 2, 24, init_std=0.3, attention_bias=True, mlp_bias=True)
)
TOKENS = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
RULE = r".*/(attention|ffn)/\w+/kernel"


def drawn(params, key):
    def of(name, leaf):
        return 0.3 * jax.random.normal(key, leaf.shape) if name.endswith("/bias") else leaf

    return map_named(of, params)


@pytest.fixture
def params(key):
    return decoder.init(MODEL, key)


@pytest.fixture
def shapes(key):
    return jax.eval_shape(lambda: decoder.init(BIASED, key))


def test_at_init_nothing_changes(params):
    tuned = bias.add(params, RULE)
    np.testing.assert_array_equal(logits(MODEL, tuned, TOKENS), logits(MODEL, params, TOKENS))


def test_moved_to_a_model_with_biases_it_is_the_same_function(params, shapes, key):
    """Logits, and the gradient of every bias."""
    tuned = drawn(bias.add(params, RULE), key)
    moved = bias.move(tuned, shapes)
    assert jax.tree.structure(moved) == jax.tree.structure(shapes)

    def loss(model):
        return jax.jit(
            jax.value_and_grad(lambda p: (model.apply({"params": p}, TOKENS) ** 2).mean())
        )

    (value, grads), (other, moved_grads) = loss(MODEL)(tuned), loss(BIASED)(moved)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    ours = {
        n.replace("/kernel/bias", "/bias"): g for n, g in named_leaves(grads) if n.endswith("bias")
    }
    theirs = {n: g for n, g in named_leaves(moved_grads) if n.endswith("bias")}
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for name, gradient in theirs.items():
        # The bias of a key adds the same to every score: its gradient is nothing but rounding.
        np.testing.assert_allclose(ours[name], gradient, atol=1e-5, err_msg=name)
    assert np.abs(logits(MODEL, tuned, TOKENS) - logits(MODEL, params, TOKENS)).max() > 0.1


def test_moving_fills_with_zeros_and_names_what_has_no_place(params, shapes, key):
    tuned = drawn(bias.add(params, r".*/(q|v)/kernel"), key)
    moved = bias.move(tuned, shapes)
    assert not np.any(moved["stack_0"]["block_0"]["ffn"]["up"]["bias"])
    np.testing.assert_allclose(
        logits(BIASED, moved, TOKENS), logits(MODEL, tuned, TOKENS), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"has no stack_0/block_0/attention/(q|v)/bias; its layers"
    ):
        bias.move(tuned, params)
    short = {name: value for name, value in tuned.items() if name != "final_norm"}
    with pytest.raises(ValueError, match=r"the other model has final_norm/scale, which is not in"):
        bias.move(short, shapes)


def test_no_matrix_holds_a_bias(params):
    tuned = bias.add(params, r".*/q/kernel")
    with pytest.raises(
        ValueError,
        match=r"^stack_0/block_0/attention/q/kernel cannot be merged: Biased adds a bias",
    ):
        merge(tuned)
    jax.tree.map(np.testing.assert_array_equal, bias.remove(tuned), params)


def test_all_forms_of_a_model_agree(params, shapes, key):
    tuned = drawn(bias.add(lora.add(params, r".*/q/kernel", key), RULE), key)
    want = logits(BIASED, bias.move(tuned, shapes), TOKENS)
    for form, found in forms(MODEL, tuned, TOKENS).items():
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5, err_msg=form)
    np.testing.assert_allclose(
        logits(MODEL, for_decoding(tuned), TOKENS), want, rtol=1e-5, atol=2e-5
    )


def test_only_what_a_rule_names_trains(params, key):
    tokens = np.asarray(TOKENS)
    check_only_these_train(
        MODEL, bias.add(params, RULE), bias.TRAINABLE, tokens, key, "kernel/bias"
    )
    check_only_these_train(MODEL, params, bias.NORMS, tokens, key, "norm/scale")


def test_rules_for_the_biases_that_a_model_has(params, key):
    names = [
        name for name, _ in named_leaves(decoder.init(decoder.Decoder(gpt(40, 1, 16, 4, 20)), key))
    ]
    block = "stack_0/block_0"
    linear = [f"attention/{x}" for x in "qkvo"] + ["ffn/up", "ffn/down"]
    norms = [f"{block}/attention_norm", f"{block}/ffn_norm", "final_norm"]
    biases = {f"{block}/{x}/bias" for x in linear} | {f"{norm}/bias" for norm in norms}
    assert set(require_match(bias.TRAINABLE, names)) == biases
    halves = {f"{block}/attention/q/bias", f"{block}/ffn/up/bias"}
    assert set(require_match(bias.QUERY_AND_UP, names)) == halves
    both = {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")}
    assert set(require_match(bias.NORMS, names)) == both
    added = [name for name, _ in named_leaves(bias.add(params, RULE))]
    halves = {f"{block}/attention/q/kernel/bias", f"{block}/ffn/up/kernel/bias"}
    assert set(require_match(bias.QUERY_AND_UP, added)) == halves


def test_axes_follow_the_matrix(params):
    axes = base.leaf_axes(bias.add(params, r".*/q/kernel"), decoder.axes(MODEL))
    q = axes["stack_0"]["block_0"]["attention"]["q"]["kernel"]
    assert (q.base, q.bias) == (("layers", "embed", "heads"), ("layers", "heads"))


def test_bad_rules(params, key):
    with pytest.raises(RuleError, match=r"matches none of .* paths"):
        bias.add(params, r".*/qproj/kernel")
    with pytest.raises(ValueError, match=r"stands on kernels, not on embed/table"):
        bias.add(params, r"embed/table")
    with pytest.raises(ValueError, match=r"stands on matrices .* not final_norm/scale"):
        bias.add(params, r"final_norm/scale")
    with pytest.raises(ValueError, match=r"q/kernel has a bias already: train .*/attention/q/bias"):
        bias.add(decoder.init(BIASED, key), r".*/q/kernel")
