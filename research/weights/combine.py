"""One LoRA out of several: weighted sums of what adapters of one base have learned.

With weights w_i, ΔW_i = s_i A_i B_i, and the scale of the result 1 (task arithmetic, Ilharco et al.
2022, arXiv:2212.04089, on low-rank updates):

    combine_cat     A = [w_1 s_1 A_1, w_2 s_2 A_2, ...],  B = [B_1; B_2; ...]      Σ w_i ΔW_i exactly
    combine_svd     the best A B of a given rank for Σ w_i ΔW_i (Eckart and Young 1936)
    combine_linear  A = Σ ±√|w_i s_i| A_i,  B = Σ √|w_i s_i| B_i

These are "cat", "svd" and "linear" of Hugging Face PEFT's add_weighted_adapter. The last is rough:
its product has the terms A_i B_j between adapters, too; it is exact for one adapter.

Differences from PEFT:
1. The scale is 1 also where adapters were rank-stabilized (PEFT gives the result √R then).
2. The SVD is taken of the factors' triangles (QR), and not of the whole [in, out] matrix.
3. One adapter is truncated by `combine_svd` like any other; PEFT copies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from research.paths import map_named
from research.types import Array, Params
from research.weights.bank import align
from research.weights.base import is_weight
from research.weights.lora import LoRA

Factors = tuple[Array, Array]  # a [..., in, R], b [..., R, out]
Weighted = list[tuple[float, LoRA]]


def combine_linear(adapters: Sequence[Params], weights: Sequence[float]) -> Params:
    """The base with the sums of the factors. ValueError where their ranks differ."""
    return combined(adapters, weights, sums)


def combine_cat(adapters: Sequence[Params], weights: Sequence[float]) -> Params:
    """The base with Σ w_i ΔW_i exactly, of the ranks' sum."""
    return combined(adapters, weights, lambda name, nodes: joined(nodes))


def combine_svd(
    adapters: Sequence[Params], weights: Sequence[float], rank: int | None = None
) -> Params:
    """The base with Σ w_i ΔW_i to `rank`, by default the largest of the adapters' at each matrix."""
    if rank is not None and rank < 1:
        raise ValueError(f"a rank of at least 1 is needed, not {rank}")

    def truncated(name: str, nodes: Weighted) -> Factors:
        R = max(node.a.shape[-1] for _, node in nodes) if rank is None else rank
        return best_of_rank(*joined(nodes), R)

    return combined(adapters, weights, truncated)


def combined(
    adapters: Sequence[Params],
    weights: Sequence[float],
    of: Callable[[str, Weighted], Factors],
) -> Params:
    """The shared base, with a LoRA of scale 1 and factors of(path, [(weight, LoRA)]) where any has one.

    ValueError when there is not one weight an adapter, or they do not share a base.
    """
    if len(adapters) != len(weights):
        raise ValueError(f"there are {len(adapters)} adapters and {len(weights)} weights")
    base, factors = align(adapters)

    def together(name: str, w: Any) -> Any:
        pairs = zip(weights, factors, strict=True)
        nodes = [(weight, found[name]) for weight, found in pairs if name in found]
        return LoRA(w, *of(name, nodes), 1.0) if nodes else w

    return map_named(together, base, is_leaf=is_weight)


def sums(name: str, nodes: Weighted) -> Factors:
    """The sign of a weight goes to one side, the root of its size to both."""
    ranks = [node.a.shape[-1] for _, node in nodes]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"{name}: factors of ranks {ranks} do not add; use combine_cat or combine_svd"
        )
    scales = [weight * node.scale for weight, node in nodes]
    roots = [abs(scale) ** 0.5 for scale in scales]
    signed = [math.copysign(*pair) for pair in zip(roots, scales, strict=True)]
    a = sum(root * node.a for root, (_, node) in zip(signed, nodes, strict=True))
    b = sum(root * node.b for root, (_, node) in zip(roots, nodes, strict=True))
    return a, b


def joined(nodes: Weighted) -> Factors:
    """Factors whose product is Σ w_i s_i a_i b_i."""
    a = jnp.concatenate([weight * node.scale * node.a for weight, node in nodes], axis=-1)
    return a, jnp.concatenate([node.b for _, node in nodes], axis=-2)


def best_of_rank(a: Array, b: Array, rank: int) -> Factors:
    """The nearest product of `rank` to a b in the Frobenius norm; fewer when a b cannot have so many.

    a b = Q_a (R_a R_bᵀ) Q_bᵀ, so that the middle has the singular values. They stay with b.
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.mT)
    u, s, v = jnp.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    left, right = q_a @ u[..., :rank], v[..., :rank, :] @ q_b.mT
    return left, s[..., :rank, None] * right
