"""Codes of a table in blocks along an array's last axis, each divided by its largest magnitude.

What 4-bit matrices, double quantized scales and 8-bit optimizer states share (arXiv:2110.02861).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from research.codes.tables import look_up, nearest
from research.types import Array

# A block whose magnitudes are all below this counts as zeros. The CPU backend takes numbers that are
# too small for float32's exponent for zeros anyway.
SMALLEST = 1.17549435e-38


def encode(
    x: Array, table: str, block: int, find: Callable[[Array, str], Array] = nearest
) -> tuple[Array, Array]:
    """x [..., n] -> (codes uint8 [..., n], absmax float32 [..., ceil(n / block)]).

    The last block may be shorter. `find` gives the code of a number in [-1, 1] of a table.
    """
    cut = blocks(x.astype(jnp.float32), block)
    absmax = jnp.abs(cut).max(axis=-1)
    scaled = cut * (1.0 / jnp.maximum(absmax, SMALLEST))[..., None]
    codes = find(jnp.clip(scaled, -1, 1), table)
    return codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], absmax


def decode(codes: Array, absmax: Array, table: str, block: int) -> Array:
    """Codes [..., n] and absmax [..., ceil(n / block)] -> float32 [..., n]."""
    cut = look_up(blocks(codes, block), table) * absmax[..., None]
    return cut.reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]]


def blocks(x: Array, block: int) -> Array:
    """x [..., n] -> [..., ceil(n / block), block], the last one filled up with zeros."""
    short = -x.shape[-1] % block
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return padded.reshape(*x.shape[:-1], -1, block)
