"""A matrix stored the other way round, because a CPU multiplies a few rows faster by it.

A step of decoding multiplies 1 to 16 rows by every matrix and waits for memory alone. XLA's CPU
products read W [in, out] at half the machine's bandwidth then; Wᵀ [out, in] times the rows as
columns reads each of its rows once, in order (docs/PERFORMANCE.md has the numbers).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import struct

from research.types import Array, Params
from research.weights.base import Call, Weight, is_weight
from research.weights.int8 import QuantizedInputs
from research.weights.outliers import Decomposed
from research.weights.quantized import is_quantized


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


@partial(jax.jit, static_argnames="dense")
def transpose(tree: Params, dense: bool = False) -> Params:
    """Every matrix of one layer, or of a head, as a `Transposed`, and the base of an adapter too; a
    Weight without a base stays. Stacked matrices [L, in, out] are not for it: see `unstack`.

    With `dense` matrices of few bits become dense ones, except where inputs are rounded too: those
    multiply integers.
    """
    return jax.tree.map(lambda w: _transposed(w, dense), tree, is_leaf=is_weight)


def _transposed(w: Any, dense: bool) -> Any:
    if dense and is_quantized(w):
        return Transposed(w.dense().mT)
    if is_weight(w):
        dense = dense and not isinstance(w, QuantizedInputs | Decomposed)
        return w.replace(base=_transposed(w.base, dense)) if hasattr(w, "base") else w
    return Transposed(w.mT) if w.ndim == 2 else w
