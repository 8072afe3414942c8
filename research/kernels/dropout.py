"""Which attention probabilities are dropped: a function of a seed and a place, not of a stream.

A kernel that works tile by tile, forward and again backward, in any order, must drop the same
probabilities every time, and so must the T×S reference. So whether (head, query i, key j) is kept is
computed from its indices by a counter-based hash: the rounds of murmur3's 32-bit finaliser
(Appleby 2011), once for a row, once for a column and once for the pair.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from research.types import Array

GOLDEN = 0x9E3779B9  # an odd number whose multiples spread over 32 bits


def seed_of(rng: Array) -> Array:
    """A key -> two words, uint32 [2]."""
    return jax.random.bits(rng, (2,), jnp.uint32)


def kept(seed: Array, head: Array, i: Array, j: Array, rate: float) -> Array:
    """1 / (1 - rate) where the probability is kept and 0 where it is dropped, float32.

    seed [2] uint32 (or two scalars); `head` counts heads over the whole batch, b * N + n; i and j
    are indices of queries and keys. They are broadcast against each other.
    """
    first, second = seed[0], seed[1]
    row = _mix(first ^ _mix(_word(head) * jnp.uint32(GOLDEN) + second) ^ _mix(_word(i) + first))
    column = _mix(_word(j) * jnp.uint32(GOLDEN) + second)
    # 24 bits make an exact float32 in [0, 1).
    uniform = _shift(_mix(row + column), 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24
    return jnp.where(uniform >= rate, 1 / (1 - rate), 0.0)


def check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate must be at least 0 and below 1, not {rate}")


def _word(x: Array | int) -> Array:
    return jnp.asarray(x).astype(jnp.uint32)


def _shift(x: Array, bits: int) -> Array:
    return lax.shift_right_logical(x, jnp.full_like(x, bits))


def _mix(x: Array) -> Array:
    x = (x ^ _shift(x, 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ _shift(x, 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ _shift(x, 16)
