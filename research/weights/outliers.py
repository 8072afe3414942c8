"""LLM.int8(): features of the inputs with large numbers in float, the others in int8.

Dettmers et al. 2022 (arXiv:2208.07339), section 3. Features of x [M, in] in which some row reaches
`threshold` are multiplied in float by the dequantized rows of the matrix; the others are rounded to
int8, a scale for each row of x and each column of the matrix, and summed in int32.

Differences and choices:
1. Shapes do not depend on data: features are masked, not taken out, so the float product has full
   size. This computes what the method computes, and does not save what it saves.
2. A row's scale comes from its numbers below the threshold, those in outlier features included, as in
   bitsandbytes; the paper takes these features out first.
3. bitsandbytes rounds x to 16 bits first and reads threshold 0 as "no outliers". Here that is
   infinity, and at 0 every feature is an outlier.
4. The features are those of all rows of a pass, so a token's result depends on its batch.

The gradient passes the rounding unchanged: dx = g Wᵀ with the dequantized matrix, as in bitsandbytes.
LoRA goes on top, after `add`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.types import Array, Params
from research.weights.base import (
    Call,
    Weight,
    change,
    dense,
    is_weight,
    matmul,
    matmul_transposed,
    take,
)
from research.weights.int8 import (
    require_base,
    scaled_product,
    step_size,
    sums_integers,
    to_steps,
)
from research.weights.quantized import Quantized
from research.weights.straight import straight_through


@struct.dataclass
class Decomposed(Weight):
    """base [..., in, out], 8-bit integers with one scale a stored row."""

    base: Quantized
    threshold: float = struct.field(pytree_node=False, default=6.0)

    def dense(self) -> Array:
        return dense(self.base)

    def matmul(self, x: Array, call: Call) -> Array:
        return straight_through(partial(_product, matmul, self.threshold), _smooth, self.base, x)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        product = partial(_product, matmul_transposed, self.threshold)
        return straight_through(product, _smooth_transposed, self.base, x)

    def take(self, ids: Array, call: Call) -> Array:
        return take(self.base, ids, call)

    def axes(self, names: tuple) -> Decomposed:
        return self.replace(base=self.base.axes(names))


def parts(x: Array, threshold: float) -> tuple[Array, Array, Array]:
    """(int8 steps [M, n], their size float32 [M, 1], outliers [M, n] in x's dtype) of inputs x [M, n].

    Steps are 0 in features that hold an outlier, outliers 0 in all others.
    """
    large = jnp.abs(x) >= threshold
    features = large.any(axis=0)
    size = step_size(jnp.where(large, 0, x), 8, "token")
    return to_steps(jnp.where(features, 0, x), size, 8), size, jnp.where(features, x, 0)


def _product(multiply: Callable, threshold: float, w: Quantized, x: Array) -> Array:
    steps, size, outliers = parts(x, threshold)
    return scaled_product(steps, size, w).astype(x.dtype) + multiply(outliers, w)


def _smooth(w: Quantized, x: Array) -> Array:
    return matmul(x, w)


def _smooth_transposed(w: Quantized, x: Array) -> Array:
    return matmul_transposed(x, w)


def add(params: Params, rule: str, threshold: float = 6.0) -> Params:
    """Params whose matrices at the paths that `rule` matches whole treat large inputs apart.

    They are `Quantized` with Integer(8, "row"), or "matrix". RuleError when the rule matches nothing,
    ValueError for other matrices, naming the path, and for a negative threshold.
    """
    if not threshold >= 0:
        raise ValueError(f"a threshold of magnitudes is at least 0, not {threshold}")

    def wrap(name: str, w: Any, number: int) -> Decomposed:
        require_base("LLM.int8", name, w)
        if not sums_integers(w, transposed=name.endswith("/table")):
            raise ValueError(f'LLM.int8 needs {name} quantized to Integer(8, "row")')
        return Decomposed(w, float(threshold))

    return change(params, rule, wrap)


def remove(params: Params) -> Params:
    """The model whose inputs are not rounded."""
    return jax.tree.map(
        lambda w: w.base if isinstance(w, Decomposed) else w, params, is_leaf=is_weight
    )
