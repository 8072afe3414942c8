"""(IA)^3: learned vectors that scale keys, values and the inside of the feed-forward network.

Liu et al. 2022 (arXiv:2205.05638), section 3.3:

    k = l_k * (x W_k + b_k),   v = l_v * (x W_v + b_v),   ffn(x) = (l_ff * h) W_down,

with h the activations and every l beginning as ones, so that at first nothing changes.

Differences and choices:
1. Keys are scaled before they are rotated, as in Hugging Face PEFT (the paper's T5 rotates nothing).
2. An output is scaled with its bias in it, as in the paper and in PEFT. The bias is a leaf beside
   the kernel here, which the layer adds by itself, so the node keeps a copy as `shift` and computes
   l * x W + (l - 1) * shift. Should the bias itself be trained besides, what it has learned is not
   scaled: there this differs from PEFT.
3. An input is scaled without regard to a bias: that is added after the product.

A scaled matrix is a matrix, W diag(l) or diag(l) W, and `base.merge` gives it. A scaled bias is not
one: where a layer has a bias `base.merge` refuses, and `merge` here puts both where they belong.
Other methods go under this one (`ScaledOutput(base=LoRA(...))`) where there is a bias.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

from research.paths import map_named, named_leaves, require_match
from research.types import Array, Params
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
from research.weights.bias import bias_beside

# What the paper scales, and of it what is scaled where it goes in.
RULE = r".*/(attention|cross)/(k|v)/kernel|.*/ffn/down/kernel"
INPUTS = r".*/ffn/down/kernel"
TRAINABLE = r".*/(kernel|table)/scale"  # the vectors, as a path rule for `partition`


@struct.dataclass
class ScaledOutput(Weight):
    """W diag(scale), and the layer's bias times scale. base [..., in, out], scale [..., out].

    `shift` [..., out] is a copy of that bias, None where the layer has none.
    """

    base: Any
    scale: Array
    shift: Array | None = None

    def matrix(self) -> Array:
        base = dense(self.base)
        return (base * self.scale[..., None, :]).astype(base.dtype)

    def dense(self) -> Array:
        if self.shift is not None:
            raise ValueError(
                "ScaledOutput scales the layer's bias too, which no matrix can say: "
                "merge with `ia3.merge` first"
            )
        return self.matrix()

    def matmul(self, x: Array, call: Call) -> Array:
        y = scaled(matmul(x, self.base, call), self.scale)
        return y if self.shift is None else y + self.more_bias().astype(y.dtype)

    def more_bias(self) -> Array:
        """What is added to the bias, [..., out]: the layer adds it unscaled already."""
        return (self.scale - 1) * self.shift

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return matmul_transposed(scaled(x, self.scale), self.base, call)

    def take(self, ids: Array, call: Call) -> Array:
        return scaled(take(self.base, ids, call), self.scale)

    def axes(self, names: tuple) -> ScaledOutput:
        base = self.base.axes(names) if is_weight(self.base) else names
        vector = (*names[:-2], names[-1])
        return ScaledOutput(base, vector, None if self.shift is None else vector)


@struct.dataclass
class ScaledInput(Weight):
    """diag(scale) W. base [..., in, out], scale [..., in]."""

    base: Any
    scale: Array

    def dense(self) -> Array:
        base = dense(self.base)
        return (base * self.scale[..., None]).astype(base.dtype)

    def matmul(self, x: Array, call: Call) -> Array:
        return matmul(scaled(x, self.scale), self.base, call)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return scaled(matmul_transposed(x, self.base, call), self.scale)

    def take(self, ids: Array, call: Call) -> Array:
        return scaled(take(self.base, ids, call), jnp.take(self.scale, ids)[..., None])

    def axes(self, names: tuple) -> ScaledInput:
        base = self.base.axes(names) if is_weight(self.base) else names
        return ScaledInput(base, names[:-1])


def scaled(x: Array, scale: Array) -> Array:
    """x * scale in the wider type of both, as x's."""
    return (x * scale).astype(x.dtype)


def add(
    params: Params, rule: str = RULE, rng: Array | None = None, inputs: str | None = INPUTS
) -> Params:
    """Params with a vector of ones at every matrix whose path `rule` matches whole.

    Where `inputs` matches too the input is scaled, else the output. Nothing is drawn from `rng`:
    it is there because all methods are added alike. RuleError when a rule matches nothing,
    ValueError for a leaf that is not a matrix.
    """
    leaves = dict(named_leaves(params, is_leaf=is_weight))
    scales_input = set() if inputs is None else set(require_match(inputs, list(leaves)))

    def wrap(name: str, w: Any, number: int) -> Weight:
        *layers, inner, outer = matrix_shape("(IA)^3", name, w)
        if name in scales_input:
            return ScaledInput(w, jnp.ones((*layers, inner)))
        return ScaledOutput(w, jnp.ones((*layers, outer)), leaves.get(bias_beside(name)))

    return change(params, rule, wrap)


def merge(params: Params) -> Params:
    """The same function with the vectors multiplied into the matrices and biases they scale.

    Weights of other kinds stay, and with them an (IA)^3 that stands under one.
    """
    leaves = dict(named_leaves(params, is_leaf=is_weight))

    def multiplied(name: str, w: Any) -> Any:
        if isinstance(w, ScaledOutput):
            return w.matrix()
        if isinstance(w, ScaledInput):
            return w.dense()
        kernel = leaves.get(name.removesuffix("bias") + "kernel")
        if name.endswith("/bias") and getattr(kernel, "shift", None) is not None:
            return (w + kernel.more_bias()).astype(w.dtype)
        return w

    return map_named(multiplied, params, is_leaf=is_weight)


def remove(params: Params) -> Params:
    """The base model again, the vectors forgotten."""

    def base_of(name: str, w: Any) -> Any:
        return w.base if isinstance(w, ScaledOutput | ScaledInput) else w

    return map_named(base_of, params, is_leaf=is_weight)
