"""LoRA against its algebra; `tests/hub/test_peft.py` holds it against peft's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import decoder
from research.models.families.llama import llama
from research.paths import RuleError, named_leaves
from research.weights import base, lora, merge

MODEL = decoder.Decoder(llama(40, 3, 16, 4, 2, 24, tied=True, init_std=0.3))
ALL = r".*/kernel|embed/table"
TOKENS = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)


@jax.jit
def logits(params, **more):
    return MODEL.apply({"params": params}, TOKENS, **more)


def filled(params, key):
    """Factors that are not zero, so that the branch matters."""

    def of(w):
        if not isinstance(w, lora.LoRA):
            return w
        return w.replace(
            a=0.3 * jax.random.normal(key, w.a.shape), b=jax.random.normal(key, w.b.shape) * 0.05
        )

    return jax.tree.map(of, params, is_leaf=base.is_weight)


@pytest.fixture
def params(key):
    return decoder.init(MODEL, key)


def test_at_init_nothing_changes_and_only_b_has_a_gradient(params, key):
    tuned = lora.add(params, r".*/kernel", key, rank=4, alpha=8)
    np.testing.assert_array_equal(logits(tuned), logits(params))
    grads = jax.grad(lambda p: (logits(p) ** 2).mean())(tuned)
    for name, grad in named_leaves(grads):
        if name.endswith("kernel/a"):
            assert not np.any(grad), name
        if name.endswith("kernel/b"):
            assert np.any(grad), name


def test_at_init_an_embedding_has_a_zero_and_b_not(params, key):
    """The other way about: A [V, R] is 0, so only A has a gradient."""
    tuned = lora.add(params, r"embed/table", key, rank=4, alpha=8)
    table = tuned["embed"]["table"]
    assert not np.any(table.a) and np.all(table.b)
    np.testing.assert_array_equal(logits(tuned), logits(params))
    grad = jax.grad(lambda p: (logits(p) ** 2).mean())(tuned)["embed"]["table"]
    assert not np.any(grad.b)
    assert np.any(grad.a)


def test_merged_equals_unmerged_for_every_matrix_and_the_tied_table(params, key):
    tuned = filled(lora.add(params, ALL, key, rank=4, alpha=8), key)
    assert np.abs(logits(tuned) - logits(params)).max() > 0.1
    np.testing.assert_allclose(logits(merge(tuned)), logits(tuned), atol=1e-5)


def test_scale_is_alpha_over_rank_or_over_its_root(params, key):
    rule = r".*/attention/q/kernel"

    def query(p):
        return p["stack_0"]["block_0"]["attention"]["q"]["kernel"]

    assert query(lora.add(params, rule, key, rank=4, alpha=8)).scale == 2
    assert query(lora.add(params, rule, key, rank=4, alpha=8, rank_stabilized=True)).scale == 4
    assert query(lora.add(params, rule, key, rank=4)).scale == 1


def test_dense_is_the_sum_written_out(params, key):
    tuned = filled(lora.add(params, r".*/ffn/up/kernel", key, rank=2, alpha=6), key)
    w = tuned["stack_0"]["block_0"]["ffn"]["up"]["kernel"]
    for layer in range(3):
        want = np.asarray(w.base[layer]) + 3 * np.asarray(w.a[layer]) @ np.asarray(w.b[layer])
        np.testing.assert_allclose(w.dense()[layer], want, atol=1e-5)


def test_dropout_touches_the_branch_only_and_only_in_training(params, key):
    fresh = lora.add(params, r".*/kernel", key, rank=4, dropout=0.5)
    rngs = {"dropout": jax.random.key(1)}
    np.testing.assert_array_equal(logits(fresh, rngs=rngs), logits(params))  # b is 0: no branch
    tuned = filled(fresh, key)
    np.testing.assert_array_equal(logits(tuned), logits(tuned))
    other = logits(tuned, rngs={"dropout": jax.random.key(2)})
    assert np.abs(logits(tuned, rngs=rngs) - other).max() > 1e-3
    np.testing.assert_array_equal(logits(tuned, rngs=rngs), logits(tuned, rngs=rngs))


def test_dropout_keeps_the_mean(key):
    w = lora.LoRA(jnp.zeros((8, 3)), jnp.ones((8, 2)), jnp.ones((2, 3)), scale=1.0, dropout=0.25)
    x = jnp.ones((20_000, 8))
    dropped = base.matmul(x, w, base.Call(dropout=key))
    np.testing.assert_allclose(dropped.mean(), 16.0, rtol=0.01)


def test_each_layer_has_its_own_factors(params, key):
    w = lora.add(params, r".*/q/kernel", key)["stack_0"]["block_0"]["attention"]["q"]["kernel"]
    assert np.abs(w.a[0] - w.a[1]).max() > 0.01


def test_axes_follow_the_matrix(params, key):
    tuned = lora.add(params, r".*/attention/q/kernel", key)
    axes = base.leaf_axes(tuned, decoder.axes(MODEL))
    w = axes["stack_0"]["block_0"]["attention"]["q"]["kernel"]
    assert w.base == ("layers", "embed", "heads")
    assert (w.a, w.b) == (("layers", "embed", "rank"), ("layers", "rank", "heads"))


def test_remove_gives_the_base_back(params, key):
    tuned = filled(lora.add(params, ALL, key), key)
    jax.tree.map(np.testing.assert_array_equal, lora.remove(tuned), params)


def test_bad_rules(params, key):
    with pytest.raises(RuleError, match=r"matches none of .* paths"):
        lora.add(params, r".*/qproj/kernel", key)
    with pytest.raises(ValueError, match="stands on matrices"):
        lora.add(params, r"final_norm/scale", key)
    with pytest.raises(ValueError, match="rank of at least 1"):
        lora.add(params, ALL, key, rank=0)
    with pytest.raises(ValueError, match=r"LoRA needs a rank of at most \d+ for .*/q/kernel"):
        lora.add(params, r".*/q/kernel", key, rank=1000)
