"""LoRA: a frozen matrix plus a trained product of two thin ones. Hu et al. 2021 (arXiv:2106.09685).

    x W  becomes  x W + scale * dropout(x) A B,   A [in, R], B [R, out], scale = alpha / R

Differences and choices:
1. Matrices are [in, out], so A and B stand to the right of x; the paper writes W + B A.
2. A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, as in Hugging Face PEFT, so at first nothing changes
   and only B has a gradient. For an embedding table A = 0 and B ~ N(0, 1).
3. rank_stabilized=True: scale = alpha / sqrt(R) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
4. Dropout falls on the input of the branch only, never on x W.

`LoRA(base=...)` may stand on any Weight: on a quantized base it is QLoRA. B = 0 is the base.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.paths import map_named, named_leaves, require_match
from research.types import Array, Params
from research.weights.base import (
    Call,
    Weight,
    dense,
    is_weight,
    matmul,
    matmul_transposed,
    take,
)

TRAINABLE = r".*/(kernel|table)/(a|b)"  # the factors, as a path rule for `partition`


@struct.dataclass
class LoRA(Weight):
    """base + scale * a b. base [..., in, out], a [..., in, R], b [..., R, out]."""

    base: Any
    a: Array
    b: Array
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def dense(self) -> Array:
        base = dense(self.base)
        product = jnp.matmul(self.a, self.b, preferred_element_type=jnp.float32)
        return (base + self.scale * product).astype(base.dtype)

    def matmul(self, x: Array, call: Call) -> Array:
        branch = self._drop(x, call) @ self.a.astype(x.dtype) @ self.b.astype(x.dtype)
        return matmul(x, self.base, call) + self.scale * branch

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        branch = self._drop(x, call) @ self.b.astype(x.dtype).T @ self.a.astype(x.dtype).T
        return matmul_transposed(x, self.base, call) + self.scale * branch

    def take(self, ids: Array, call: Call) -> Array:
        branch = jnp.take(self.a, ids, axis=0) @ self.b
        return take(self.base, ids, call) + self.scale * branch

    def axes(self, names: tuple) -> LoRA:
        base = self.base.axes(names) if is_weight(self.base) else names
        a, b = (*names[:-1], "rank"), (*names[:-2], "rank", names[-1])
        return self.replace(base=base, a=a, b=b)

    def _drop(self, x: Array, call: Call) -> Array:
        if call.dropout is None or self.dropout == 0:
            return x
        keep = jax.random.bernoulli(call.dropout, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)


def add(
    params: Params,
    rule: str,
    rng: Array,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
) -> Params:
    """Params with a LoRA around every matrix whose path `rule` matches whole.

    rule: e.g. r".*/attention/(q|v)/kernel" or r".*/kernel|embed/table". alpha defaults to `rank`.
    Factors are float32. RuleError when the rule matches nothing, ValueError for a leaf that is
    not a matrix or a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"LoRA needs a rank of at least 1, not {rank}")
    names = [name for name, _ in named_leaves(params, is_leaf=is_weight)]
    chosen = set(require_match(rule, names))
    scale = (rank if alpha is None else alpha) / (rank**0.5 if rank_stabilized else rank)

    def wrap(name: str, leaf: Any) -> Any:
        if name not in chosen:
            return leaf
        key = jax.random.fold_in(rng, names.index(name))
        a, b = initial_factors(name, jax.eval_shape(dense, leaf).shape, key, rank)
        return LoRA(leaf, a, b, scale, dropout)

    return map_named(wrap, params, is_leaf=is_weight)


def initial_factors(name: str, shape: tuple, key: Array, rank: int) -> tuple[Array, Array]:
    """a [..., in, R] and b [..., R, out] whose product is zero."""
    if len(shape) < 2 or not name.endswith(("/kernel", "/table")):
        raise ValueError(f"LoRA stands on matrices (.../kernel or .../table), not {name} {shape}")
    *layers, inner, outer = shape
    if name.endswith("/table"):
        return jnp.zeros((*layers, inner, rank)), jax.random.normal(key, (*layers, rank, outer))
    bound = inner**-0.5
    a = jax.random.uniform(key, (*layers, inner, rank), minval=-bound, maxval=bound)
    return a, jnp.zeros((*layers, rank, outer))


def remove(params: Params) -> Params:
    """The base model again, the adapter forgotten."""
    return jax.tree.map(lambda w: w.base if isinstance(w, LoRA) else w, params, is_leaf=is_weight)
