"""Codes of 8 bits as bitsandbytes finds them on a CPU: in a table of 65,536 equal steps from -1 to 1."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from research.codes.tables import table_of
from research.types import Array

STEPS = 2**16


def nearest_step(x: Array, name: str) -> Array:
    """The code uint8 of the entry nearest to the step that is nearest to each x in [-1, 1].

    A step is 3e-5. The entries of a dynamic table are closer than that around zero: most of those, and
    zero itself, are never found.
    """
    table, last = table_of(name), np.float32(STEPS - 1)
    middles = (table[:-1] + table[1:]) / np.float32(2)
    steps = np.float32(2) * np.arange(STEPS, dtype=np.float32) / last - np.float32(1)
    codes = np.searchsorted(middles, steps).astype(np.uint8)
    return jnp.asarray(codes)[((x + 1) * 0.5 * last + 0.5).astype(jnp.int32)]
