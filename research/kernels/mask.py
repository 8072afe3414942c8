"""Which query may look at which key, as a structure and not as a T×S array.

A kernel reads the structure and skips whole blocks; `to_dense` is for the reference form and for
pictures. All parts combine by *and*, except `prefix`, which opens the columns before it to every
query (prefix-LM) before the remaining parts are applied.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from research.types import Array


@struct.dataclass
class Mask:
    """Query i (of T) stands at key index `offset + i`; key j is visible when all parts agree.

    causal           j <= offset + i
    window           offset + i - j < window   (and j - (offset + i) < window when not causal)
    prefix     [B]   opens j < prefix[b] to every query, whatever causal and window say
    query_segments [B, T], key_segments [B, S]   equal and not 0 (0 is padding)
    slopes     [N]   ALiBi: adds slopes[n] * (j - (offset + i)) to the scaled scores; not a mask
                     in the strict sense, but what a kernel needs to know in the same place

    `offset` is 0 in training (a Python int, so that kernels can skip blocks), and the index of the
    first new token in the cache when decoding (bottom-right alignment).
    """

    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    offset: int | Array = 0
    prefix: Array | None = None
    query_segments: Array | None = None
    key_segments: Array | None = None
    slopes: Array | None = None


def distance(mask: Mask, T: int, S: int) -> Array:
    """[T, S] int32: key index minus query index, `j - (offset + i)`."""
    i = jnp.arange(T, dtype=jnp.int32)[:, None] + mask.offset
    return jnp.arange(S, dtype=jnp.int32)[None, :] - i


def to_dense(mask: Mask, T: int, S: int) -> Array:
    """Visibility as a boolean array, [1 or B, 1, T, S]. For the reference form and pictures."""
    gap = distance(mask, T, S)
    visible = jnp.ones((T, S), bool)
    if mask.causal:
        visible &= gap <= 0
    if mask.window is not None:
        visible &= jnp.abs(gap) < mask.window
    visible = visible[None, None]
    if mask.prefix is not None:
        visible |= (jnp.arange(S)[None, :] < mask.prefix[:, None])[:, None, None, :]
    if mask.query_segments is not None:
        query, key = mask.query_segments[:, None, :, None], mask.key_segments[:, None, None, :]
        visible &= (query == key) & (key != 0)
    return visible
