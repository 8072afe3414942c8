"""LoRA: a frozen matrix plus a trained product of two thin ones. Hu et al. 2021 (arXiv:2106.09685).

    x W  becomes  x W + scale * dropout(x) A B,   A [in, R], B [R, out], scale = alpha / R

Differences and choices:
1. Matrices are [in, out], so A and B stand to the right of x; the paper writes W + B A.
2. How A and B begin is a function, see `lora_init`; by default as in Hugging Face PEFT.
3. rank_stabilized=True: scale = alpha / sqrt(R) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
4. Dropout falls on the input of the branch only, never on x W.
5. LoRA-FA (Zhang et al. 2023, arXiv:2308.03303) is a rule: A stays as it began, and the backward
   pass keeps x A [M, R] instead of x [M, in].
6. LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is a tuple of rates: B learns `ratio` times as fast.

`LoRA(base=...)` may stand on any Weight: on a quantized base it is QLoRA. B = 0 is the base.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.paths import map_named
from research.types import Array, Params
from research.weights import lora_init
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

# Path rules for `partition`: the factors; LoRA-FA's. LoRA-FA is for kernels alone, because for an
# embedding table A is what begins as zero.
TRAINABLE = r".*/(kernel|table)/(a|b)"
TRAINABLE_FA = r".*/kernel/b"


@struct.dataclass
class LoRA(Weight):
    """base + scale * a b. base [..., in, out], a [..., in, R], b [..., R, out].

    `residual` says that the base is not the model's own matrix, but what the first a b left of it.
    """

    base: Any
    a: Array
    b: Array
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    residual: bool = struct.field(pytree_node=False, default=False)

    def dense(self) -> Array:
        base = dense(self.base)
        product = jnp.matmul(self.a, self.b, preferred_element_type=jnp.float32)
        return (base + self.scale * product).astype(base.dtype)

    def matmul(self, x: Array, call: Call) -> Array:
        branch = dropped(x, self.dropout, call) @ self.a.astype(x.dtype) @ self.b.astype(x.dtype)
        return matmul(x, self.base, call) + self.scale * branch

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        branch = (
            dropped(x, self.dropout, call) @ self.b.astype(x.dtype).T @ self.a.astype(x.dtype).T
        )
        return matmul_transposed(x, self.base, call) + self.scale * branch

    def take(self, ids: Array, call: Call) -> Array:
        branch = jnp.take(self.a, ids, axis=0) @ self.b
        return take(self.base, ids, call) + self.scale * branch

    def axes(self, names: tuple) -> LoRA:
        base = self.base.axes(names) if is_weight(self.base) else names
        a, b = (*names[:-1], "rank"), (*names[:-2], "rank", names[-1])
        return self.replace(base=base, a=a, b=b)


def add(
    params: Params,
    rule: str,
    rng: Array,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    initial: lora_init.Initial = lora_init.uniform,
) -> Params:
    """Params with a LoRA around every matrix whose path `rule` matches whole.

    rule: e.g. r".*/attention/(q|v)/kernel" or r".*/kernel|embed/table". alpha defaults to `rank`.
    Factors are float32; `initial` is one of `lora_init`. RuleError when the rule matches nothing,
    ValueError for a leaf that is not a matrix, or a rank that is not in 1..min(in, out).
    """
    if rank < 1:
        raise ValueError(f"LoRA needs a rank of at least 1, not {rank}")
    scale = (rank if alpha is None else alpha) / (rank**0.5 if rank_stabilized else rank)

    def wrap(name: str, w: Any, number: int) -> LoRA:
        base, a, b = initial(name, w, jax.random.fold_in(rng, number), rank, scale)
        return LoRA(base, a, b, scale, dropout, residual=base is not w)

    return change(params, rule, wrap)


def remove(params: Params) -> Params:
    """The base model again, the adapter forgotten.

    ValueError naming the path where the base is a residual (PiSSA, OLoRA): see `on_original`.
    """

    def base_of(name: str, w: Any) -> Any:
        if not isinstance(w, LoRA):
            return w
        if w.residual:
            raise ValueError(
                f"the base of {name} is only what its first factors left of the matrix: merge it, "
                "or make it a plain LoRA first with `lora.on_original`"
            )
        return w.base

    return map_named(base_of, params, is_leaf=is_weight)


def on_original(params: Params, start: Params, original: Params) -> Params:
    """A trained PiSSA or OLoRA as a plain LoRA of twice the rank on the model's own matrices.

    `original` is what `add` was given and `start` what it gave (for the same arguments it gives it
    again): W - scale a₀ b₀ + scale a b = W + scale [a, a₀] [b; -b₀]. PiSSA, appendix on conversion.
    """

    def plain(w: Any, first: Any, base: Any) -> Any:
        if not (isinstance(w, LoRA) and w.residual):
            return w
        a = jnp.concatenate([w.a, first.a], axis=-1)
        b = jnp.concatenate([w.b, -first.b], axis=-2)
        return LoRA(base, a, b, w.scale, w.dropout)

    return jax.tree.map(plain, params, start, original, is_leaf=is_weight)


def plus_rates(ratio: float = 16.0) -> tuple[tuple[str, float], ...]:
    """LoRA+: `rates` of an Optimizer that multiply the rate of every kernel's B by `ratio`."""
    return ((r".*/kernel/b", ratio), (r".*", 1.0))
