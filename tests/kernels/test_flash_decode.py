"""Split-K decoding, interpreted, against the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.flash_decode import flash_decode
from research.kernels.mask import Mask

B = 2


def operands(key, T, S, N, K, H, dtype=jnp.float32):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [
        jax.random.normal(x, s, dtype)
        for x, s in zip(jax.random.split(key, 3), shapes, strict=True)
    ]


def everything(T, S, N):
    ids = jnp.array(np.sort(np.random.default_rng(0).integers(0, 4, (B, S)), axis=1))
    return Mask(
        window=33,
        offset=S - T,
        prefix=jnp.array([0, 29]),
        slopes=2.0 ** -jnp.arange(1, N + 1),
        query_segments=ids[:, S - T :],
        key_segments=ids,
    )


SHAPES = [
    (1, 150, 6, 2, 32, None),
    (3, 150, 4, 4, 24, 2),
    (1, 5, 4, 1, 64, None),
    (5, 300, 4, 2, 16, 4),
]


@pytest.mark.parametrize(("T", "S", "N", "K", "H", "parts"), SHAPES)
def test_equals_the_reference(key, T, S, N, K, H, parts):
    q, k, v = operands(key, T, S, N, K, H)
    decode = partial(flash_decode, scale=0.4, softcap=0.8, tile=32, parts=parts, interpret=True)
    for mask in (Mask(offset=jnp.int32(max(0, S - T - 3))), everything(T, S, N)):
        ours = jax.jit(decode)(q, k, v, mask)
        np.testing.assert_allclose(ours, reference(q, k, v, mask, 0.4, softcap=0.8), atol=2e-6)


def test_a_row_that_sees_nothing_is_zero(key):
    q, k, v = operands(key, 1, 100, 2, 1, 16)
    mask = Mask(
        offset=99, query_segments=jnp.array([[0], [1]]), key_segments=jnp.ones((B, 100), jnp.int32)
    )
    out = flash_decode(q, k, v, mask, interpret=True)
    assert not np.any(out[0]) and np.any(out[1])


def test_many_queries_are_refused(key):
    q, k, v = operands(key, 17, 64, 2, 1, 16)
    with pytest.raises(ValueError, match=r"at most 16 queries and 64 rows .* not 17 and 34"):
        flash_decode(q, k, v, Mask(offset=3), interpret=True)
    with pytest.raises(ValueError, match="64 rows of queries for a key head, not 16 and 128"):
        flash_decode(jnp.zeros((1, 16, 8, 16)), k[:1], v[:1], Mask(offset=3), interpret=True)
    with pytest.raises(ValueError, match="in 1 part or more, not 0"):
        flash_decode(q[:, :1], k, v, Mask(offset=3), parts=0, interpret=True)


def test_gradients_are_those_of_the_plain_form(key):
    q, k, v = operands(key, 3, 40, 4, 2, 16)
    mask = everything(3, 40, 4)

    def grads(attend):
        def loss(q, k, v, slopes):
            return (attend(q, k, v, mask.replace(slopes=slopes), 0.4, softcap=1.5) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, mask.slopes)

    ours = grads(partial(flash_decode, interpret=True))
    for x, y in zip(ours, grads(reference), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
