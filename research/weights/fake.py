"""Quantization-aware training: a dense matrix that multiplies as if it were quantized already.

`add` puts one of two Weights around a dense matrix, training goes on, and `finish` makes the
`Quantized` matrices whose values the model was trained with.

FakeQuantized rounds to a format whose scales come from the matrix as it is now. The gradient passes
the rounding unchanged (Bengio et al. 2013, arXiv:1308.3432, `straight`), and the scales count as
constants. It is masked nowhere, because with scales of its own numbers no format of `formats` clips:
the largest of a group has a code, and rounding `zero_point="integer"` moves the ends of a group by at
most half a step, so that they still have their nearest code.

LearnedStep is LSQ (Esser et al. 2019, arXiv:1902.08153): the scale, there the step, is trained.

    v̂ = s · round(clip(v / s, -Q_N, Q_P)),   Q_N = 2^(bits - 1), Q_P = Q_N - 1
    dv̂/dv = 1 inside the range, 0 outside
    dv̂/ds = round(v / s) - v / s inside, -Q_N or Q_P outside; times 1 / sqrt(n Q_P)

It clips, and so masks. Differences and choices:
1. A step belongs to the group of n numbers that the format says, the paper's to a whole layer
   (`Integer(bits, "matrix")`). It begins as in the paper, at 2 mean|v| / sqrt(Q_P).
2. Only matrices are rounded. `int8` rounds activations, with scales that do not train.
3. A symmetric format leaves its first code unused; LSQ uses it, as the paper does, and `finish`
   keeps it. So 2 bits have the steps -2, -1, 0, 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.types import Array, Params
from research.weights.base import Weight, change, dense
from research.weights.formats import Format, Integer, grouped, spread
from research.weights.quantized import Quantized, encode, packed, require_dense
from research.weights.straight import round_through, straight_through

# Path rules for `partition`: the matrices and steps. A step should not decay: give the optimizer
# decay=((NO_DECAY, False), *optim.DECAY).
TRAINABLE = r".*/(base|step)"
NO_DECAY = r".*/step"

SMALLEST_STEP = 1e-8  # the step of a group of zeros


@struct.dataclass
class FakeQuantized(Weight):
    """base [..., in, out], which trains. `transposed`: groups lie along the matrix's columns."""

    base: Any
    format: Format = struct.field(pytree_node=False)
    transposed: bool = struct.field(pytree_node=False)

    def quantized(self) -> Quantized:
        """What it stands for, in few bits."""
        return encode(_rows(self), self.format, self.transposed)

    def dense(self) -> Array:
        def rounded(rows: Array) -> Array:
            return encode(rows, self.format, self.transposed).values()

        values = straight_through(rounded, lambda rows: rows, _rows(self))
        return values.mT if self.transposed else values

    def axes(self, names: tuple) -> FakeQuantized:
        return self.replace(base=names)


@struct.dataclass
class LearnedStep(Weight):
    """base [..., in, out] and step [..., rows or 1, groups] float32, which both train."""

    base: Any
    step: Array
    format: Integer = struct.field(pytree_node=False)
    transposed: bool = struct.field(pytree_node=False)

    def steps(self, step: Array) -> Array:
        """The stored rows in steps, clipped: [..., rows, columns] between -Q_N and Q_P."""
        rows, most = _rows(self), self.format.middle - 1
        # clamp has no gradient at the edges themselves, as the paper wants
        return jax.lax.clamp(-float(most + 1), rows / spread(step, rows.shape[-1]), float(most))

    def quantized(self) -> Quantized:
        codes = jnp.round(self.steps(self.step)) + self.format.middle
        return packed(codes, self.step, None, self.format, self.transposed)

    def dense(self) -> Array:
        shape = jax.eval_shape(_rows, self).shape
        shared = shape[-1] * shape[-2] // (self.step.shape[-1] * self.step.shape[-2])
        step = _slowed(self.step, (shared * (self.format.middle - 1)) ** -0.5)
        values = round_through(self.steps(step)) * spread(step, shape[-1])
        return values.mT if self.transposed else values

    def axes(self, names: tuple) -> LearnedStep:
        *layers, first, last = names
        rows = last if self.transposed else first
        step = (*layers, rows if self.step.shape[-2] > 1 else None, None)
        return self.replace(base=names, step=step)


def _rows(w: FakeQuantized | LearnedStep) -> Array:
    matrix = dense(w.base).astype(jnp.float32)
    return matrix.mT if w.transposed else matrix


def _slowed(x: Array, factor: float) -> Array:
    """x, whose gradient is multiplied by `factor`."""
    return straight_through(lambda x: x, lambda x: factor * x, x)


def add(params: Params, rule: str, format: Format, learned_step: bool = False) -> Params:
    """Params with every dense matrix whose path `rule` matches whole rounded while it trains.

    `learned_step` trains the scales too (LSQ), for a symmetric Integer whose scales are not double
    quantized. RuleError when the rule matches nothing; ValueError, naming the path, for what
    `quantized.quantize` refuses: a leaf that is not a matrix, that is a Weight already, that holds
    nan or inf, or that the groups do not fill.
    """
    symmetric = isinstance(format, Integer) and format.zero_point == "middle"
    if learned_step and not (symmetric and not format.double):
        raise ValueError(
            "a learned step needs an Integer format with zero_point='middle' and double=False, "
            f"not {format}"
        )

    def wrap(name: str, w: Any, number: int) -> FakeQuantized | LearnedStep:
        require_dense("quantization-aware training", name, w)
        transposed = not name.endswith("/table")
        try:
            node = (_learned if learned_step else FakeQuantized)(w, format, transposed)
            jax.eval_shape(lambda node: node.quantized(), node)
        except ValueError as error:
            raise ValueError(f"{name} {w.shape}: {error}") from error
        return node

    return change(params, rule, wrap)


def _learned(w: Array, format: Integer, transposed: bool) -> LearnedStep:
    rows = (w.mT if transposed else w).astype(jnp.float32)
    mean = jnp.abs(grouped(rows, format.group)).mean(axis=-1)
    step = jnp.maximum(2 * mean / (format.middle - 1) ** 0.5, SMALLEST_STEP)
    return LearnedStep(w, step, format, transposed)


def is_fake(node: Any) -> bool:
    return isinstance(node, FakeQuantized | LearnedStep)


def finish(params: Params) -> Params:
    """The trained model with `Quantized` matrices of the same values, inside other Weights too.

    ValueError when there is nothing to finish.
    """
    if not any(map(is_fake, jax.tree.leaves(params, is_leaf=is_fake))):
        raise ValueError("finish: there is no fake-quantized matrix among the parameters")
    return jax.tree.map(lambda w: w.quantized() if is_fake(w) else w, params, is_leaf=is_fake)
