"""Numbers in [-1, 1] that a code of 4 or 8 bits may mean, and the nearest code of a number.

NF4      quantiles of a normal distribution, with an exact zero: Dettmers et al. 2023, QLoRA
         (arXiv:2305.14314), section 3 and appendix E, as the paper's library rounds them
E2M1     4-bit floats with two bits of exponent, as in the OCP microscaling formats; over 6
E3M0     4-bit floats with three: zero and powers of two; over 16
FP4      bitsandbytes' 4-bit float, which is neither; over 12
DYNAMIC  8 bits: a decade in unary, then equal steps in what bits are left: Dettmers 2015
         (arXiv:1511.04561); DYNAMIC_UNSIGNED has no negative numbers and twice the steps

A 4-bit float is a sign bit and a magnitude, so that its table is not sorted and has two zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from research.types import Array

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
NF4 += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
NF4 += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def _float4(*magnitudes: float) -> np.ndarray:
    half = np.array(magnitudes, np.float32) / np.float32(max(magnitudes))
    return np.concatenate([half, -half])


def _dynamic(signed: bool) -> np.ndarray:
    """Seven decades 10^-6 .. 1, each with twice the steps of the one below, rounded as bitsandbytes
    rounds: their edges, their middles and these times the decade to float32 in turn."""
    values = [np.zeros(1), np.ones(1)]
    for decade in range(7):
        count = 2**decade * (1 if signed else 2)
        low, high = np.float32(0.1), np.float32(1)
        step, place = np.float64((high - low) / np.float32(count)), np.arange(count + 1)
        upward, downward = low + step * place, high - step * (count - place)
        edges = np.where(2 * place < count + 1, upward, downward).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values)).astype(np.float32)


TABLES = {
    "NF4": np.array(NF4, np.float32),
    "E2M1": _float4(0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "E3M0": _float4(0, 0.25, 0.5, 1, 2, 4, 8, 16),
    "FP4": _float4(0, 0.0625, 8, 12, 4, 6, 2, 3),
    "DYNAMIC": _dynamic(signed=True),
    "DYNAMIC_UNSIGNED": _dynamic(signed=False),
}

FEW = 16  # entries that are compared with all at once


def table_of(name: str) -> np.ndarray:
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r} of codes; there are {', '.join(TABLES)}")
    return TABLES[name]


def nearest(x: Array, name: str) -> Array:
    """The code uint8 of the entry nearest to each x; of two at the same distance the lower one."""
    table = table_of(name)
    order = np.argsort(table, kind="stable")
    ascending = table[order]
    middles = (ascending[:-1] + ascending[1:]) / np.float32(2)
    if len(table) <= FEW:
        # A search compiles for many seconds: XLA looks up its first step, the same for all of a
        # large x, while it compiles.
        below = sum((x > middle).astype(jnp.uint8) for middle in middles)
    else:
        below = jnp.searchsorted(middles, x, method="scan_unrolled")
    return jnp.asarray(order, jnp.uint8)[below]


def look_up(codes: Array, name: str) -> Array:
    """The entry float32 of each code."""
    return jnp.asarray(table_of(name))[codes]


def choose(codes: Array, entries: Sequence[Array]) -> Array:
    """Of 2^bits arrays of the shape of `codes`, each code's.

    Halved by one bit of the codes after another: XLA's CPU loops do not read a table several codes at
    a time, but they choose so. Entries that are constants would be kept whole beside a scanned step.
    """
    left, place = list(entries), 0
    while len(left) > 1:
        odd = (codes >> place & 1).astype(bool)
        left = [jnp.where(odd, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
        place += 1
    return left[0]
