"""Statistics of what a matrix is multiplied with, as a gradient: calibration without a change of model.

An `Observed` stands around a matrix and has a leaf `statistic` of zeros. Its forward pass is the base's
and measures its input; its backward pass gives this measurement as the leaf's cotangent, whatever comes
from above. So `jax.grad` of anything with respect to the statistics is the statistics, reduced where
they arise, under jit, scan and rematerialisation, one for each layer of a stack.
(`quantize.calibrate` runs it over text.) A matrix that is used twice in one pass adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    matrix_shape,
    take,
)

# (inputs [M, in]) -> a tree of float32 arrays; (inputs, given) where something is given
Measure = Callable[..., Any]


@struct.dataclass
class Observed(Weight):
    """base [..., in, out]; statistic: what `measure` gives, with the base's leading axes; given: what it
    gets besides the inputs, with the same axes, or None."""

    base: Any
    statistic: Any
    measure: Measure = struct.field(pytree_node=False)
    given: Any = None

    def dense(self) -> Array:
        return dense(self.base)

    def matmul(self, x: Array, call: Call) -> Array:
        return matmul(self._noted(x), self.base, call)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        """Of a tied head, whose inputs are the states [M, out]."""
        return matmul_transposed(self._noted(x), self.base, call)

    def take(self, ids: Array, call: Call) -> Array:
        return take(self.base, ids, call)

    def _noted(self, x: Array) -> Array:
        """x, whose measurement is the gradient of the statistic."""
        given = () if self.given is None else (self.given,)
        return _pass(x, jax.lax.stop_gradient(self.measure(x, *given)), self.statistic)


@jax.custom_vjp
def _pass(x: Array, measured: Any, statistic: Any) -> Array:
    return x


def _forward(x: Array, measured: Any, statistic: Any) -> tuple[Array, Any]:
    return x, measured


def _backward(measured: Any, g: Array) -> tuple[Array, Any, Any]:
    return g, jax.tree.map(jnp.zeros_like, measured), measured


_pass.defvjp(_forward, _backward)


def add(
    params: Params, rule: str, measure: Measure, given: Mapping[str, Any] | None = None
) -> Params:
    """Params with every matrix or Weight whose path `rule` matches whole observed.

    given: {path: what the measure gets besides, with the leading axes of the matrix}. A table's inputs
    are those of a tied head. RuleError when the rule matches nothing; ValueError for a path that
    nothing is given for.
    """

    def wrap(name: str, w: Any, number: int) -> Observed:
        *layers, inner, outer = matrix_shape("observation", name, w)
        width = outer if name.endswith("/table") else inner
        if given is not None and name not in given:
            raise ValueError(
                f"the measure of {name} needs something given, there is {sorted(given)}"
            )
        own = None if given is None else given[name]
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[len(layers) :], a.dtype), own)
        inputs = jax.ShapeDtypeStruct((1, width), jnp.float32)
        kinds = jax.eval_shape(measure, *((inputs,) if own is None else (inputs, one)))
        zeros = jax.tree.map(lambda kind: jnp.zeros((*layers, *kind.shape), kind.dtype), kinds)
        return Observed(w, zeros, measure, own)

    return change(params, rule, wrap)


def is_observed(node: Any) -> bool:
    return isinstance(node, Observed)


def remove(params: Params) -> Params:
    """The model without observers."""
    return jax.tree.map(lambda w: w.base if is_observed(w) else w, params, is_leaf=is_weight)
