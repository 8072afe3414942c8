"""The reference form against JAX's own attention, repeated heads, hand numbers and slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels import attend
from research.kernels.attend import attention_weights
from research.kernels.mask import Mask, to_dense

reference = jax.jit(attend.reference, static_argnames="scale")


def operands(key, B=2, T=7, S=7, N=4, K=2, H=8):
    keys = jax.random.split(key, 3)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(causal=False), Mask(window=3), Mask(prefix=jnp.array([2, 5]))],
    ids=["causal", "full", "window", "prefix"],
)
def test_equals_jax_attention(key, mask):
    q, k, v = operands(key)
    wanted = jax.nn.dot_product_attention(q, k, v, mask=to_dense(mask, 7, 7))
    np.testing.assert_allclose(reference(q, k, v, mask), wanted, atol=2e-6)


def test_causal_and_scale_equal_jax_attention_without_our_mask(key):
    q, k, v = operands(key)
    wanted = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    np.testing.assert_allclose(reference(q, k, v, Mask(), scale=0.3), wanted, atol=2e-6)


def test_query_heads_share_a_key_head_in_runs(key):
    q, k, v = operands(key, N=8, K=2)
    repeated = reference(q, jnp.repeat(k, 4, axis=2), jnp.repeat(v, 4, axis=2), Mask())
    np.testing.assert_allclose(reference(q, k, v, Mask()), repeated, atol=2e-6)


def test_segments_equal_separate_sequences(key):
    q, k, v = operands(key, B=1, T=9, S=9)
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    packed = reference(q, k, v, Mask(query_segments=ids, key_segments=ids))
    for part in (slice(0, 4), slice(4, 7)):
        alone = reference(q[:, part], k[:, part], v[:, part], Mask())
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-6)
    assert not np.any(packed[:, 7:])


def test_offset_gives_the_last_rows_of_the_whole(key):
    q, k, v = operands(key, T=9, S=9)
    whole = reference(q, k, v, Mask(window=4))
    tail = reference(q[:, 6:], k, v, Mask(window=4, offset=jnp.int32(6)))
    np.testing.assert_allclose(tail, whole[:, 6:], atol=2e-6)


def test_alibi_by_hand():
    # Equal scores, slope ln 2: each step back halves the weight, 1/4 : 1/2 : 1 in the last row.
    q = k = jnp.zeros((1, 3, 1, 2))
    weights = attention_weights(q, k, Mask(slopes=jnp.array([np.log(2.0)])))
    np.testing.assert_allclose(weights[0, 0, 2], np.array([1, 2, 4]) / 7, rtol=1e-6)


def test_rows_that_see_nothing_are_zero_with_finite_gradients(key):
    q, k, v = operands(key)
    ids = jnp.zeros((2, 7), int).at[0].set(1)
    mask = Mask(query_segments=ids, key_segments=ids)
    out, grads = jax.value_and_grad(
        lambda *qkv: jnp.sum(reference(*qkv, mask) ** 2), argnums=(0, 1, 2)
    )(q, k, v)
    assert np.isfinite(out)
    for grad in grads:
        assert np.all(np.isfinite(grad)) and np.any(grad[0]) and not np.any(grad[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 7, 8)}, r"must be \[B, T, N, H\]"),
        ({"q": (2, 7, 3, 8)}, "3 query heads are not a multiple of 2"),
        ({"v": (2, 6, 2, 8)}, r"k and v must be \[2, S, K, 8\]"),
        ({"k": (3, 7, 2, 8), "v": (3, 7, 2, 8)}, r"k and v must be \[2, S, K, 8\]"),
        ({"mask": Mask(prefix=jnp.zeros(3, int))}, r"mask.prefix must be \(2,\)"),
        ({"mask": Mask(slopes=jnp.zeros(2))}, r"mask.slopes must be \(4,\)"),
        ({"mask": Mask(query_segments=jnp.ones((2, 7), int))}, "or neither"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    shapes = {"q": (2, 7, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 8)} | change
    mask = shapes.pop("mask", Mask())
    with pytest.raises(ValueError, match=message):
        reference(**{name: jnp.zeros(shape) for name, shape in shapes.items()}, mask=mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask(offset=jnp.arange(3)), r"mask.offset must be one number, not \(3,\)"),
        (Mask(window=0), "a window of 0 keys sees nothing"),
    ],
)
def test_masks_that_mean_nothing_are_refused(mask, message):
    q = jnp.ones((1, 3, 1, 4))
    with pytest.raises(ValueError, match=message):
        reference(q, q, q, mask)
