"""A matrix of few bits: packed codes, and the scales that groups of codes share.

Stored are rows whose groups lie along the last axis. Those of a kernel are the matrix's columns, as
other libraries store it and as one output shares its scales; those of an embedding table are its own
rows, so that some of them can be read alone. `formats` says what codes mean.

LoRA over it is QLoRA. The dense form is rebuilt where a layer multiplies, and again in the backward
pass, never kept. What a model holds is counted from its arrays: `bits_per_parameter`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.codes.packing import pack
from research.types import Array, Params
from research.weights import double
from research.weights.base import FEW_ROWS, Call, Weight, change, is_weight, matrix_shape
from research.weights.formats import Format, decoded


@struct.dataclass
class Quantized(Weight):
    """codes uint8 [..., rows, bytes]; scale [..., rows or 1, groups], float or `DoubleQuantized`;
    zero like scale, or None. `transposed`: the rows are the matrix's columns."""

    codes: Array
    scale: Any
    zero: Array | None
    format: Format = struct.field(pytree_node=False)
    transposed: bool = struct.field(pytree_node=False)

    def values(self) -> Array:
        """What is stored, as float32 [..., rows, columns]."""
        return decoded(self.codes, double.scales(self.scale), self.zero, self.format)

    def dense(self) -> Array:
        values = self.values()
        return values.mT if self.transposed else values

    def matmul(self, x: Array, call: Call) -> Array:
        return _times_rows(self, x) if self.transposed else super().matmul(x, call)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return super().matmul_transposed(x, call) if self.transposed else _times_rows(self, x)

    def take(self, ids: Array, call: Call) -> Array:
        if self.transposed:
            return super().take(ids, call)
        flat, scale = ids.reshape(-1), double.scales(self.scale)
        whole = scale.shape[-2] == 1  # one scale for all rows
        some = Quantized(
            self.codes[flat],
            scale if whole else scale[flat],
            self.zero if whole or self.zero is None else self.zero[flat],
            self.format,
            self.transposed,
        )
        return some.values().reshape(*ids.shape, -1)

    def axes(self, names: tuple) -> Quantized:
        *layers, first, last = names
        rows, columns = (last, first) if self.transposed else (first, last)
        scale, zero = self.scale, self.zero
        spread = (*layers, rows if scale.shape[-2] > 1 else None, None)
        if isinstance(scale, double.DoubleQuantized):
            scale = double.DoubleQuantized(spread, (*layers, None), tuple(layers))
        else:
            scale = spread
        return self.replace(
            codes=(*layers, rows, columns), scale=scale, zero=None if zero is None else spread
        )


def _times_rows(w: Quantized, x: Array) -> Array:
    """x [M, columns] times the stored rows: [M, rows]. A few inputs stand on the right of packed
    codes: XLA's CPU backend makes a product of one row on the left one loop with what unpacks them,
    which takes twice the time (docs/PERFORMANCE.md). Bytes are the faster for that loop."""
    few = x.shape[0] <= FEW_ROWS and w.format.bits < 8

    def product(w: Quantized, x: Array) -> Array:
        rows = w.values().astype(x.dtype)
        return (rows @ x.T).T if few else x @ rows.T

    return jax.checkpoint(product, prevent_cse=False)(w, x)


def quantize(params: Params, rule: str, format: Format) -> Params:
    """Params with every matrix whose path `rule` matches whole rounded to the nearest code.

    Each matrix is scaled by itself, each layer of a stack too. RuleError when the rule matches
    nothing; ValueError, naming the path, for a leaf that is not a matrix, one that is a Weight
    already, one that holds nan or inf, and one whose axis the groups do not fill.
    """

    def encode(name: str, w: Any, number: int) -> Quantized:
        return quantized(name, w, format)

    return change(params, rule, encode)


def quantized(name: str, w: Array, format: Format) -> Quantized:
    """The matrix w [..., in, out] at path `name` in few bits; errors as in `quantize`."""
    require_dense("quantization", name, w)
    transposed = not name.endswith("/table")
    try:
        return encode(w.mT if transposed else w, format, transposed)
    except ValueError as error:
        raise ValueError(f"{name} {w.shape}: {error}") from error


def require_dense(method: str, name: str, w: Any) -> None:
    """ValueError naming what stands at `name`, unless it is a matrix of finite numbers."""
    if is_weight(w):
        raise ValueError(
            f"{method} stands on dense matrices, and {name} is a {type(w).__name__} already: "
            "quantize before adapters are added, or `merge` first"
        )
    matrix_shape(method, name, w)
    if not jnp.isfinite(w).all():
        raise ValueError(f"{name} {w.shape} holds nan or inf, which have no code")


@partial(jax.jit, static_argnames=("format", "transposed"))
def encode(rows: Array, format: Format, transposed: bool) -> Quantized:
    """Rows [..., rows, columns] as they are stored, each at its nearest code."""
    rows = rows.astype(jnp.float32)
    scale, zero = format.scales(rows)
    return packed(format.round(rows, scale, zero), scale, zero, format, transposed)


def packed(
    codes: Array, scale: Array, zero: Array | None, format: Format, transposed: bool
) -> Quantized:
    """The Weight of codes [..., rows, columns] and their scales [..., rows or 1, groups]."""
    kept = double.quantize(scale) if format.double else scale
    return Quantized(pack(codes, format.bits), kept, zero, format, transposed)


def is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def bits_per_parameter(params: Params) -> float:
    """Bits of the arrays of all `Quantized` matrices, over the number of numbers they stand for."""
    found = [w for w in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(w)]
    if not found:
        raise ValueError("there is no quantized matrix among the parameters")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(found))
    return 8 * held / sum(jax.eval_shape(Quantized.dense, w).size for w in found)
