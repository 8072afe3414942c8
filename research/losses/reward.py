"""Losses of reward models: scores of answers such that the better one is greater (Bradley–Terry)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.types import Array


def pairwise(
    chosen: Array, rejected: Array, margin: Array | float = 0.0, centre: float = 0.0
) -> Array:
    """−log σ(r_w − r_l − m) + c (r_w + r_l)² of each pair, [B].

    m says how much better an answer is, where that is known (Llama 2: Touvron et al. 2023,
    arXiv:2307.09288, eq. 2); c keeps scores about 0, which differences alone do not (Eisenstein et al.
    2023, arXiv:2312.09244).
    """
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return losses + centre * jnp.square(chosen + rejected)


def ranked(scores: Array) -> Array:
    """Mean of −log σ(s_i − s_j) over all pairs i before j of an order, scores [..., K] best first
    (InstructGPT: Ouyang et al. 2022, arXiv:2203.02155, eq. 1). ValueError for fewer than 2."""
    count = scores.shape[-1]
    if count < 2:
        raise ValueError(f"an order needs 2 answers or more, not {count}")
    better, worse = jnp.triu_indices(count, 1)
    return -jax.nn.log_sigmoid(scores[..., better] - scores[..., worse]).mean(-1)
