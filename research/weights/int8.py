"""Inputs of few bits, and products of integers: W8A8, W4A8 and their kin.

    x W  becomes  scale_x · (round(x / scale_x) Q) · scale_w,   Q the integers of W

`QuantizedInputs` stands around a matrix and rounds what is multiplied with it to 2^bits - 1 steps of
one size, as SmoothQuant's code does (Xiao et al. 2022, arXiv:2211.10438): the largest magnitude, at
least 1e-5, over 2^(bits - 1) - 1. `per` says whose largest magnitude:

    "token"    each row of x its own, found in the pass (dynamic)
    "tensor"   that of all rows of the pass, padding included (dynamic)
    "static"   one that calibration found, a leaf; larger inputs are clipped

One Weight serves all widths, and the matrix decides how it multiplies. Where its integers share one
scale a row (a symmetric `Integer` whose group is "row" or "matrix") and are stored along the axis that
is summed (x W of a kernel, states Wᵀ of a tied table), the product is of int8 numbers and summed in
int32: W8A8. Elsewhere the rounded inputs are multiplied in float: W4A8 with groups, 4-bit tables,
dense and fake-quantized matrices. This is the same function up to float32's rounding.

The gradient is that of the float form and passes the rounding of inputs unchanged, also where a
static scale clips: dx = g Wᵀ. A static scale has no gradient. LoRA goes on top, after `add`:
quantize, add, lora.add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.codes.packing import unpack
from research.types import Array, Params
from research.weights import double
from research.weights.base import (
    Call,
    Weight,
    change,
    dense,
    is_weight,
    matmul,
    matmul_transposed,
    matrix_shape,
    take,
)
from research.weights.fake import is_fake
from research.weights.formats import Integer
from research.weights.quantized import Quantized, is_quantized
from research.weights.straight import straight_through

EPSILON = 1e-5  # the smallest largest magnitude
LONGEST = (2**31 - 1) // (127 * 128)  # so many products of int8 numbers fit in int32


@struct.dataclass
class QuantizedInputs(Weight):
    """base [..., in, out]; scale float32 [...] (the size of a step) when `per` is "static", or None."""

    base: Any
    scale: Array | None
    bits: int = struct.field(pytree_node=False, default=8)
    per: str = struct.field(pytree_node=False, default="token")

    def dense(self) -> Array:
        return dense(self.base)

    def matmul(self, x: Array, call: Call) -> Array:
        return straight_through(_product, _smooth, self, x)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return straight_through(_product_transposed, _smooth_transposed, self, x)

    def take(self, ids: Array, call: Call) -> Array:
        """Rows of a table, which has no inputs then."""
        return take(self.base, ids, call)

    def axes(self, names: tuple) -> QuantizedInputs:
        base = self.base.axes(names) if is_weight(self.base) else names
        return self.replace(base=base, scale=None if self.scale is None else tuple(names[:-2]))

    def rounded(self, x: Array) -> tuple[Array, Array]:
        """x [M, n] as int8 steps [M, n] of the size float32 [M or 1, 1]."""
        scale = self.scale
        if scale is None:
            scale = step_size(x, self.bits, self.per)
        return to_steps(x, scale.reshape(-1, 1), self.bits), scale.reshape(-1, 1)


def step_size(x: Array, bits: int, per: str) -> Array:
    """The scale float32 [M, 1] of each row of x [M, n], or with per="tensor" [1, 1] of all."""
    axis = -1 if per == "token" else None
    return scale_of(jnp.abs(x.astype(jnp.float32)).max(axis=axis, keepdims=True), bits)


def scale_of(largest: Array, bits: int) -> Array:
    """The size of a step, of which 2^(bits - 1) - 1 reach the `largest` magnitude."""
    return jnp.maximum(largest, EPSILON) / (2 ** (bits - 1) - 1)


def to_steps(x: Array, scale: Array, bits: int) -> Array:
    """x in steps, clipped to ±(2^(bits - 1) - 1), int8."""
    most = 2 ** (bits - 1) - 1
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -most, most).astype(jnp.int8)


def sums_integers(w: Any, transposed: bool) -> bool:
    """Whether x w (`transposed`: x wᵀ) can be summed before scales are looked at."""
    if not (is_quantized(w) and isinstance(w.format, Integer) and w.zero is None):
        return False
    return w.scale.shape[-1] == 1 and w.transposed != transposed


def integers(w: Quantized) -> tuple[Array, Array]:
    """(int8 [rows, n], scale float32 [rows or 1]) of one matrix of which `sums_integers` is true."""
    steps = unpack(w.codes, w.format.bits) - jnp.uint8(w.format.middle)  # modulo 256
    return jax.lax.bitcast_convert_type(steps, jnp.int8), double.scales(w.scale)[:, 0]


def accumulate(x: Array, rows: Array) -> Array:
    """int8 [M, n] times int8 [rows, n] transposed, int32 [M, rows]; exact up to n = `LONGEST`."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, rows, contract, preferred_element_type=jnp.int32)


def scaled_product(steps: Array, scale: Array, w: Quantized) -> Array:
    """(steps · scale) times the rows of w, float32 [M, rows], summed as integers."""
    rows, sizes = integers(w)
    return accumulate(steps, rows) * (scale * sizes)


def _product(w: QuantizedInputs, x: Array) -> Array:
    if sums_integers(w.base, transposed=False):
        return scaled_product(*w.rounded(x), w.base).astype(x.dtype)
    return matmul(_as_rounded(w, x), w.base)


def _product_transposed(w: QuantizedInputs, x: Array) -> Array:
    if sums_integers(w.base, transposed=True):
        return scaled_product(*w.rounded(x), w.base).astype(x.dtype)
    return matmul_transposed(_as_rounded(w, x), w.base)


def _smooth(w: QuantizedInputs, x: Array) -> Array:
    return matmul(straight_through(_as_rounded, lambda w, x: x, w, x), w.base)


def _smooth_transposed(w: QuantizedInputs, x: Array) -> Array:
    return matmul_transposed(straight_through(_as_rounded, lambda w, x: x, w, x), w.base)


def _as_rounded(w: QuantizedInputs, x: Array) -> Array:
    """x with every number at its nearest step, in its own dtype."""
    steps, scale = w.rounded(x)
    return (steps * scale).astype(x.dtype)


def add(
    params: Params,
    rule: str,
    per: str = "token",
    bits: int = 8,
    largest: Mapping[str, Array] | None = None,
) -> Params:
    """Params whose matrices at the paths that `rule` matches whole round their inputs.

    They are `Quantized`, fake-quantized or dense; adapters come after. With per="static", `largest`
    has the largest magnitude of the inputs of each matrix, [...] with the layer axes of a stack:
    `calibrate.measure` with `measures.absmax`, and `.max(-1)`. RuleError when the rule matches nothing,
    ValueError for another Weight, a leaf that is not a matrix, another `per`, bits outside 2..8, a
    magnitude that is missing, not positive or of another shape, or too long sums for int32.
    """
    if per not in ("token", "tensor", "static"):
        raise ValueError(f"per is 'token', 'tensor' or 'static', not {per!r}")
    if not 2 <= bits <= 8:
        raise ValueError(f"inputs have 2 to 8 bits, not {bits}")
    if (per == "static") != (largest is not None):
        raise ValueError(f"per='static' needs `largest` and no other does; per is {per!r}")

    def wrap(name: str, w: Any, number: int) -> QuantizedInputs:
        shape = require_base("quantization of inputs", name, w)
        scale = None if largest is None else _static(name, largest, shape[:-2], bits)
        return QuantizedInputs(w, scale, bits, per)

    return change(params, rule, wrap)


def require_base(method: str, name: str, w: Any) -> tuple[int, ...]:
    """[..., in, out] of what may stand inside; ValueError naming the path of what may not."""
    if is_weight(w) and not (is_quantized(w) or is_fake(w)):
        raise ValueError(
            f"{method} stands on quantized or dense matrices, and {name} is a {type(w).__name__} "
            "already: add it before adapters"
        )
    shape = matrix_shape(method, name, w)
    for transposed, length in ((False, shape[-2]), (True, shape[-1])):
        if sums_integers(w, transposed) and length > LONGEST:
            raise ValueError(
                f"{name} {shape}: sums of {length} products do not fit in int32, {LONGEST} do"
            )
    return shape


def _static(name: str, largest: Mapping[str, Array], layers: tuple, bits: int) -> Array:
    if name not in largest:
        raise ValueError(f"`largest` has no magnitude for {name}")
    found = jnp.asarray(largest[name], jnp.float32)
    if found.shape != layers:
        raise ValueError(
            f"{name} needs a largest magnitude of shape {layers}, one for each matrix, not {found.shape}"
        )
    if not ((found > 0) & jnp.isfinite(found)).all():
        raise ValueError(f"{name} has a largest magnitude that is not a positive number: {found}")
    return scale_of(found, bits)


def remove(params: Params) -> Params:
    """The model whose inputs are not rounded."""

    def base_of(w: Any) -> Any:
        return w.base if isinstance(w, QuantizedInputs) else w

    return jax.tree.map(base_of, params, is_leaf=is_weight)
