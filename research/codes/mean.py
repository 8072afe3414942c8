"""A mean whose additions come in one stated order, so that its last bit is another library's too.

float32 sums depend on the order. This is the order of torch's kernel for contiguous rows on x86, on one
thread: 8 lanes in 4 rows that are added last, and along each a cascade of runs of 16 (a run's sum goes
into the next level's sum), which also keeps the rounding error small. On several threads torch cuts rows
of 32,768 numbers or more, and on other processors lanes are fewer: there the last bit may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.types import Array

LANES, ROWS, LEVELS = 8, 4, 4


def mean(x: Array) -> Array:
    """The mean float32 [...] of x [..., n] along its last axis, n at least 1."""
    x = jnp.moveaxis(x.astype(jnp.float32), -1, 0)
    n, width = x.shape[0], LANES if x.shape[0] >= LANES else 1
    lanes = x[: n // width * width].reshape(-1, width, *x.shape[1:])
    whole = lanes.shape[0] // ROWS * ROWS
    rows = _cascade(lanes[:whole].reshape(-1, ROWS, *lanes.shape[1:]))
    first = _in_turn([rows[0], *lanes[whole:]])
    total = _in_turn([first, *rows[1:]])
    rest = x[n // width * width :]
    total = _in_turn([*rest, *total] if len(rest) else total)
    # Behind a barrier: XLA turns a division by a constant into a product with its rounded inverse.
    return total / jax.lax.optimization_barrier(jnp.float32(n))


def _cascade(x: Array) -> Array:
    """The sum [...] of x [n, ...]: what fills no run of a level, then the level above."""
    run = 2 ** max(4, (max(len(x), 1) - 1).bit_length() // LEVELS)
    parts = []
    for _ in range(LEVELS - 1):
        whole = len(x) // run * run
        parts.append(_in_turn(x[whole:]))
        x = _in_turn(jnp.moveaxis(x[:whole].reshape(-1, run, *x.shape[1:]), 1, 0))
    return _in_turn([*parts, _in_turn(x)])


def _in_turn(parts: Array | Sequence[Array]) -> Array:
    """The sum of the entries along the first axis, one after another; zeros when there is none."""
    if len(parts) == 0:
        return jnp.zeros(parts.shape[1:], jnp.float32)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
