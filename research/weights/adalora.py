"""AdaLoRA: a frozen matrix plus a trained product in the form of an SVD, whose ranks are allocated.

Zhang et al. 2023 (arXiv:2303.10512).

    x W  becomes  x W + scale * dropout(x) A diag(E) B,   A [in, R], E [R], B [R, out]

A column of A, its entry of E and its row of B are a triplet. Training starts with `rank` triplets a
matrix and `adalora_allocate` sets E to 0 where a triplet matters least, over all matrices at once;
`orthogonality` keeps A and B near orthogonal, so that E can be read as singular values.

Differences and choices:
1. Matrices are [in, out]: A is the paper's Q transposed, B its P transposed.
2. E = 0 and A, B ~ N(0, 0.02²), as in Hugging Face PEFT, so at first nothing changes and only E
   has a gradient. An embedding table begins the same way.
3. scale = alpha / rank with the rank of the start: it does not change when triplets are pruned.
   (PEFT divides by rank + 1e-5.)
4. The regulariser is PEFT's: the *mean* over factors of the Frobenius norm, *not squared*; the
   paper's equation 4 adds squared norms.
5. A triplet that is pruned for good keeps its A and B, because a stacked leaf has one shape for all
   layers.

With E = 1 and the rank left alone it is LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.paths import named_leaves
from research.types import Array, Mean, Params
from research.weights.base import Call, Weight, change, is_weight, matrix_shape
from research.weights.lora import LoRA

TRAINABLE = r".*/(kernel|table)/(a|e|b)"  # the triplets, as a path rule for `partition`
INIT_STD = 0.02


@struct.dataclass
class AdaLoRA(Weight):
    """base + scale * a diag(e) b. base [..., in, out], a [..., in, R], e [..., R], b [..., R, out]."""

    base: Any
    a: Array
    e: Array
    b: Array
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def as_lora(self) -> LoRA:
        """The same function as a LoRA, whose second factor is diag(e) b."""
        return LoRA(self.base, self.a, self.e[..., None] * self.b, self.scale, self.dropout)

    def dense(self) -> Array:
        return self.as_lora().dense()

    def matmul(self, x: Array, call: Call) -> Array:
        return self.as_lora().matmul(x, call)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return self.as_lora().matmul_transposed(x, call)

    def take(self, ids: Array, call: Call) -> Array:
        return self.as_lora().take(ids, call)

    def axes(self, names: tuple) -> AdaLoRA:
        like = LoRA(self.base, self.a, self.b, self.scale).axes(names)
        return self.replace(base=like.base, a=like.a, e=(*names[:-2], "rank"), b=like.b)


def is_adalora(node: Any) -> bool:
    return isinstance(node, AdaLoRA)


def add(
    params: Params,
    rule: str,
    rng: Array,
    rank: int = 12,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> Params:
    """Params with an AdaLoRA of `rank` triplets around every matrix whose path `rule` matches whole.

    The paper starts with 1.5 times the average rank it ends with. alpha defaults to `rank`. Factors
    are float32. RuleError when the rule matches nothing, ValueError for a leaf that is not a matrix,
    or a rank that is not in 1..min(in, out).
    """
    if rank < 1:
        raise ValueError(f"AdaLoRA needs a rank of at least 1, not {rank}")
    scale = (rank if alpha is None else alpha) / rank

    def wrap(name: str, w: Any, number: int) -> AdaLoRA:
        *layers, inner, outer = matrix_shape("AdaLoRA", name, w, rank)
        left, right = jax.random.split(jax.random.fold_in(rng, number))
        a = INIT_STD * jax.random.normal(left, (*layers, inner, rank))
        b = INIT_STD * jax.random.normal(right, (*layers, rank, outer))
        return AdaLoRA(w, a, jnp.zeros((*layers, rank)), b, scale, dropout)

    return change(params, rule, wrap)


def remove(params: Params) -> Params:
    """The base model again, the adapter forgotten."""
    return jax.tree.map(lambda w: w.base if is_adalora(w) else w, params, is_leaf=is_weight)


def to_lora(params: Params) -> Params:
    """The same function with a LoRA for every AdaLoRA, a form that `hub.save_adapter` can write."""
    return jax.tree.map(lambda w: w.as_lora() if is_adalora(w) else w, params, is_leaf=is_weight)


def ranks(params: Params) -> dict[str, np.ndarray | int]:
    """{path: triplets with e != 0}: an int, or [L] for a stacked matrix (one count a layer)."""
    nodes = named_leaves(params, is_leaf=is_adalora)
    counts = {name: np.count_nonzero(w.e, axis=-1) for name, w in nodes if is_adalora(w)}
    return {name: int(n) if np.ndim(n) == 0 else n for name, n in counts.items()}


def orthogonality(weight: float = 0.5) -> Callable[..., tuple[Array, dict[str, Mean]]]:
    """A penalty for `objectives.with_penalty`: weight * mean of ‖Aᵀ A − I‖_F and ‖B Bᵀ − I‖_F.

    The mean is over all factors of all layers. 0.5 is PEFT's default; the paper takes 0.1 to 0.5.
    With n micro-batches give weight / n. Metric: orthogonality, the mean without its weight.
    """

    def penalty(params: Params, context: Any, rng: Array | None):
        nodes = [w for w in jax.tree.leaves(params, is_leaf=is_adalora) if is_adalora(w)]
        if not nodes:
            raise ValueError("orthogonality: there is no AdaLoRA among the parameters")
        factors = [factor for w in nodes for factor in (jnp.swapaxes(w.a, -1, -2), w.b)]
        distances = jnp.concatenate([_from_orthogonal(rows).reshape(-1) for rows in factors])
        mean = distances.mean()
        return weight * mean, {"orthogonality": Mean.of(mean)}

    return penalty


def _from_orthogonal(rows: Array) -> Array:
    """‖M Mᵀ − I‖_F of M [..., R, n]: [...]. The gradient at exactly 0 is 0, not nan."""
    rows = rows.astype(jnp.float32)
    gram = jnp.einsum("...ri,...si->...rs", rows, rows)
    square = jnp.square(gram - jnp.eye(gram.shape[-1])).sum((-1, -2))
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
