"""A matrix stored the other way round, because a CPU multiplies a few rows faster by it.

A step of decoding multiplies 1 to 16 rows by every matrix and waits for memory alone. XLA's CPU
products read W [in, out] at half the machine's bandwidth then; Wᵀ [out, in] times the rows as
columns reads each of its rows once, in order (docs/PERFORMANCE.md has the numbers).
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from research.types import Array, Params
from research.weights.base import Call, Weight, is_weight


@struct.dataclass
class Transposed(Weight):
    """stored [..., out, in] denotes the matrix [..., in, out]."""

    stored: Array

    def dense(self) -> Array:
        return self.stored.mT

    def matmul(self, x: Array, call: Call) -> Array:
        return (self.stored.astype(x.dtype) @ x.T).T

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return x @ self.stored.astype(x.dtype)

    def axes(self, names: tuple) -> Transposed:
        return Transposed((*names[:-2], names[-1], names[-2]))


@jax.jit
def transpose(tree: Params) -> Params:
    """Every matrix of one layer, or of a head, as a `Transposed`, and the base of an adapter too; a
    Weight without a base stays. Stacked matrices [L, in, out] are not for it: see `unstack`."""
    return jax.tree.map(_transposed, tree, is_leaf=is_weight)


def _transposed(w: Any) -> Any:
    if is_weight(w):
        return w.replace(base=_transposed(w.base)) if hasattr(w, "base") else w
    return Transposed(w.mT) if w.ndim == 2 else w
