"""What the tests of the kernels for a CPU share: masks, operands, gradients, a stack of layers, memory."""

import jax
import jax.numpy as jnp
import numpy as np

from research.kernels.mask import Mask

B, T, S, H = 2, 37, 45, 8
IDS = jnp.array(np.sort(np.random.default_rng(0).integers(0, 4, (B, S)), axis=1))
SEGMENTS = {"query_segments": IDS[:, S - T :], "key_segments": IDS}
PREFIX = jnp.array([0, 29])

# name: (mask, query heads, key/value heads)
CASES = {
    "causal": (Mask(), 4, 4),
    "full": (Mask(causal=False), 4, 2),
    "offset": (Mask(offset=S - T), 4, 1),
    "window": (Mask(window=9, offset=S - T), 2, 2),
    "two-sided window": (Mask(causal=False, window=6), 2, 2),
    "prefix and window": (Mask(prefix=PREFIX, window=4, offset=3), 4, 2),
    "segments": (Mask(offset=S - T, **SEGMENTS), 4, 2),
    "slopes": (Mask(slopes=2.0 ** -jnp.arange(1, 7), offset=5), 6, 2),
    "everything": (
        Mask(
            window=20,
            offset=S - T,
            prefix=PREFIX,
            slopes=2.0 ** -jnp.arange(1, 7),
            **SEGMENTS,
        ),
        6,
        2,
    ),
}


# The same over many blocks of 64, with ids that differ by row and do not ascend.
IDS_OF_MANY = jnp.array(np.random.default_rng(1).integers(0, 3, (B, 190)).repeat(2, axis=1))[
    :, 7:197
]
MANY = {
    "offset": (Mask(offset=40), 4, 1),
    "two-sided window": (Mask(causal=False, window=90, offset=11), 2, 2),
    "prefix and window": (Mask(prefix=jnp.array([170, 0]), window=30, offset=3), 4, 2),
    "segments": (
        Mask(query_segments=IDS_OF_MANY[:, 40:], key_segments=IDS_OF_MANY, offset=40),
        4,
        2,
    ),
    "all of these": (
        Mask(
            window=100,
            prefix=jnp.array([20, 140]),
            query_segments=IDS_OF_MANY[:, 40:],
            key_segments=IDS_OF_MANY,
            offset=jnp.int32(40),
        ),
        6,
        2,
    ),
}


def operands(key, N, K, T=T, S=S, B=B, dtype=jnp.float32):
    keys = jax.random.split(key, 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(x, shape, dtype) for x, shape in zip(keys, shapes, strict=True)]


def value_and_grads(attend, q, k, v, weights, mask):
    """(out, gradients of a weighted sum in q, k, v and, where there are slopes, in them)."""

    def loss(q, k, v, slopes):
        out = attend(q, k, v, mask.replace(slopes=slopes))
        return jnp.sum(out.astype(jnp.float32) * weights), out

    wanted = (0, 1, 2) if mask.slopes is None else (0, 1, 2, 3)
    grads, out = jax.jit(jax.grad(loss, wanted, has_aux=True))(q, k, v, mask.slopes)
    return out, *grads


def stack(attend, q, k, v, policy):
    """Sum of a scan over three layers that each attend and are rematerialised."""

    def layer(x, _):
        return x + attend(x, k, v, Mask()), None

    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return jax.lax.scan(layer, q, None, length=3)[0].sum()


def temporary_bytes(attend, length):
    q, kv = (jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32) for heads in (3, 1))
    loss = jax.grad(lambda q, k, v: attend(q, k, v, Mask()).sum(), (0, 1, 2))
    return jax.jit(loss).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes
