"""VeRA: two trained vectors a matrix, around random matrices that all share. Kopiczko et al. 2023
(arXiv:2310.11454).

    x W  becomes  x W + (dropout(x) A * d) B * b,   A [in, R], B [R, out] random and frozen,
                                                    d [R], b [out] trained

Differences and choices:
1. Matrices are [in, out]: A and B are the paper's transposed. There is no alpha.
2. A and B are not parameters: they are drawn again from the seed wherever they are used. Matrices
   of one `in` share A and those of one `out` share B; the paper has one pair, PEFT slices the
   pair of the largest shapes. `projections` may be any function that gives them.
3. A, B ~ U(-sqrt(6/fan_in), sqrt(6/fan_in)) (Kaiming; fan_in is `in` for A and R for B), d = 0.1,
   b = 0, as in PEFT: at first nothing changes, and only b has a gradient.
4. Kernels only, as in PEFT: for an embedding table A would have as many rows as the vocabulary.

A trained adapter is d, b, the seed and this rule of drawing, so it holds for the pinned version of
JAX; `merge` makes it independent of both. With A and B trained as well and d = 1 it is a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    dropped,
    is_weight,
    matmul,
    matmul_transposed,
    matrix_shape,
)

TRAINABLE = r".*/kernel/(d|b)"  # the vectors, as a path rule for `partition`

# (in, out, R) -> A [in, R], B [R, out]; hashable
Projections = Callable[[int, int, int], tuple[Array, Array]]


@dataclass(frozen=True)
class Drawn:
    """Projections from a seed."""

    seed: int = 0

    def __call__(self, inner: int, outer: int, rank: int) -> tuple[Array, Array]:
        # The barrier keeps XLA from drawing at compile time and putting the result in the program.
        key = jax.lax.optimization_barrier(jax.random.key(self.seed))
        first, second = jax.random.split(key)

        def draw(key: Array, shape: tuple[int, int]) -> Array:
            bound = (6 / shape[0]) ** 0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        a = draw(jax.random.fold_in(first, inner), (inner, rank))
        return a, draw(jax.random.fold_in(second, outer), (rank, outer))


@struct.dataclass
class VeRA(Weight):
    """base + A diag(d) B diag(b). base [..., in, out], d [..., R], b [..., out]."""

    base: Any
    d: Array
    b: Array
    projections: Projections = struct.field(pytree_node=False, default=Drawn())
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def dense(self) -> Array:
        base = dense(self.base)
        first, second = self._pair(base.shape[-2], jnp.float32)
        product = jnp.matmul(first * self.d[..., None, :], second) * self.b[..., None, :]
        return (base + product).astype(base.dtype)

    def matmul(self, x: Array, call: Call) -> Array:
        first, second = self._pair(x.shape[-1], x.dtype)
        d, b = self.d.astype(x.dtype), self.b.astype(x.dtype)
        branch = ((dropped(x, self.dropout, call) @ first) * d) @ second * b
        return matmul(x, self.base, call) + branch

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        inner = jax.eval_shape(dense, self.base).shape[-2]
        first, second = self._pair(inner, x.dtype)
        d, b = self.d.astype(x.dtype), self.b.astype(x.dtype)
        branch = ((dropped(x, self.dropout, call) * b @ second.T) * d) @ first.T
        return matmul_transposed(x, self.base, call) + branch

    def axes(self, names: tuple) -> VeRA:
        base = self.base.axes(names) if is_weight(self.base) else names
        return self.replace(base=base, d=(*names[:-2], "rank"), b=(*names[:-2], names[-1]))

    def _pair(self, inner: int, dtype: Any) -> tuple[Array, Array]:
        pair = self.projections(inner, self.b.shape[-1], self.d.shape[-1])
        return pair[0].astype(dtype), pair[1].astype(dtype)


def add(
    params: Params,
    rule: str,
    rng: Array,
    rank: int = 256,
    dropout: float = 0.0,
    initial_d: float = 0.1,
    projections: Projections | None = None,
) -> Params:
    """Params with a VeRA around every kernel whose path `rule` matches whole.

    The vectors are float32 and begin as constants, so all that is random is `projections`, by
    default `Drawn` with a seed from `rng`, which must be known (not traced) then. RuleError when
    the rule matches nothing, ValueError for a leaf that is not a kernel or a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"VeRA needs a rank of at least 1, not {rank}")
    if projections is None:
        projections = Drawn(int(jax.random.randint(rng, (), 0, jnp.iinfo(jnp.int32).max)))

    def wrap(name: str, w: Any, number: int) -> VeRA:
        *layers, _, outer = matrix_shape("VeRA", name, w)
        if name.endswith("/table"):
            raise ValueError(f"VeRA stands on kernels, not on an embedding table: {name}")
        d, b = jnp.full((*layers, rank), initial_d), jnp.zeros((*layers, outer))
        return VeRA(w, d, b, projections, dropout)

    return change(params, rule, wrap)


def remove(params: Params) -> Params:
    """The base model again, the adapter forgotten."""
    return jax.tree.map(lambda w: w.base if isinstance(w, VeRA) else w, params, is_leaf=is_weight)
