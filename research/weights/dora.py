"""DoRA: a matrix as the lengths of its columns times their directions. Liu et al. 2024 (arXiv:2402.09353).

    V = W + scale * A B,   A [in, R], B [R, out], scale = alpha / R
    x W  becomes  m * (x V) / |V|,   m [out] trained, |V| [out] the norms of V's columns

Differences and choices:
1. Matrices are [in, out], so a column is what one output reads, as in the paper's text and in PEFT.
2. |V| is a constant to the gradient (the paper's section 4.3), whatever else trains.
3. m begins as |W|, A and B as LoRA's, so that at first nothing changes.
4. With dropout, as in PEFT: the base as it is, and all that differs from it from the dropped input,
   x W + (m/|V| - 1) * (x' W) + m/|V| * scale x' A B. It costs a second product with the base.
5. A column of zeros has length 1 where it divides, so it stays zero and has a gradient.

|V| is computed anew in every call, from W and the factors without forming V; it reads W once more,
so decode with merged parameters. m = |V| is LoRA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.types import Array, Params
from research.weights import lora
from research.weights.base import (
    Call,
    Weight,
    change,
    dense,
    dropped,
    is_weight,
    matmul,
    matmul_transposed,
    take,
)

TRAINABLE = r".*/(kernel|table)/(a|b|magnitude)"  # as a path rule for `partition`


@struct.dataclass
class DoRA(Weight):
    """magnitude * V / |V|, V = base + scale * a b.

    base [..., in, out], a [..., in, R], b [..., R, out], magnitude [..., out].
    """

    base: Any
    a: Array
    b: Array
    magnitude: Array
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def dense(self) -> Array:
        dtype = jax.eval_shape(dense, self.base).dtype
        v = dense(self.base).astype(jnp.float32) + self.scale * jnp.matmul(self.a, self.b)
        return (v * self._factor()[..., None, :]).astype(dtype)

    def matmul(self, x: Array, call: Call) -> Array:
        factor, seen = self._factor().astype(x.dtype), dropped(x, self.dropout, call)
        branch = self.scale * (seen @ self.a.astype(x.dtype) @ self.b.astype(x.dtype))
        base = matmul(x, self.base, call)
        if seen is x:
            return factor * (base + branch)
        return base + (factor - 1) * matmul(seen, self.base, call) + factor * branch

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        factor, seen = self._factor().astype(x.dtype), dropped(x, self.dropout, call)
        scaled = factor * seen
        branch = self.scale * (scaled @ self.b.astype(x.dtype).T @ self.a.astype(x.dtype).T)
        return matmul_transposed(scaled + (x - seen), self.base, call) + branch

    def take(self, ids: Array, call: Call) -> Array:
        branch = self.scale * (jnp.take(self.a, ids, axis=0) @ self.b)
        return self._factor() * (take(self.base, ids, call) + branch)

    def axes(self, names: tuple) -> DoRA:
        base = self.base.axes(names) if is_weight(self.base) else names
        a, b = (*names[:-1], "rank"), (*names[:-2], "rank", names[-1])
        return self.replace(base=base, a=a, b=b, magnitude=(*names[:-2], names[-1]))

    def _factor(self) -> Array:
        """m / |V|, [..., out]."""
        v = jax.lax.stop_gradient(self)
        return self.magnitude / lengths(dense(v.base), v.a, v.b, v.scale)


def lengths(w: Array, a: Array, b: Array, scale: float) -> Array:
    """The norms of the columns of w + scale a b, [..., out] float32; 1 for a column of zeros, and for
    one of less than a thousandth of w's, whose digits the sum has lost.

    w [..., in, out], a [..., in, R], b [..., R, out]:
    |V_j|² = |W_j|² + 2 scale (Aᵀ W)_j · B_j + scale² (Aᵀ A B)_j · B_j.
    """
    w, thin = w.astype(jnp.float32), jnp.swapaxes(a, -1, -2)
    moved = 2 * scale * (thin @ w) + scale**2 * (thin @ a @ b)
    own = jnp.square(w).sum(axis=-2)
    squares = own + (moved * b).sum(axis=-2)
    return jnp.sqrt(jnp.where(squares <= 1e-6 * own, 1, squares))


def add(
    params: Params,
    rule: str,
    rng: Array,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
) -> Params:
    """Params with a DoRA around every matrix whose path `rule` matches whole; as `lora.add`."""
    params = lora.add(params, rule, rng, rank, alpha, dropout, rank_stabilized)

    def wrap(name: str, w: lora.LoRA, number: int) -> DoRA:
        norms = jnp.linalg.norm(dense(w).astype(jnp.float32), axis=-2)
        return DoRA(w.base, w.a, w.b, norms, w.scale, w.dropout)

    return change(params, rule, wrap)


def remove(params: Params) -> Params:
    """The base model again, the adapter forgotten."""
    return jax.tree.map(lambda w: w.base if isinstance(w, DoRA) else w, params, is_leaf=is_weight)
