"""KTO: a preference loss of single answers, each labelled good or bad (Ethayarajh et al. 2024,
arXiv:2402.01306).

    good   λ_D (1 − σ(β(ρ − z₀)))        bad   λ_U (1 − σ(β(z₀ − ρ)))        ρ = log π(y|x) − log π_ref(y|x)

z₀ is how far the policy is from the reference anyway, estimated from answers that belong to other prompts
of the batch. So a batch needs two examples at least, and one that mixes prompts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from research.types import Array


@struct.dataclass
class Answers:
    """Of B answers: log-probabilities [B] by policy and reference (sums over tokens, nats), and `good`
    [B] bool."""

    policy: Array
    reference: Array
    good: Array

    @property
    def ratios(self) -> Array:
        return self.policy - self.reference


def check_size(batch_size: int) -> None:
    """ValueError for a batch of one, where an answer would meet its own prompt alone."""
    if batch_size < 2:
        raise ValueError(
            "KTO estimates its reference point from answers to other prompts of the batch: "
            f"a batch of {batch_size} has none, take 2 or more"
        )


def reference_point(policy: Array, reference: Array, weights: Array | None = None) -> Array:
    """z₀ = max(0, mean(log π − log π_ref)) over mismatched answers [B], nats; no gradient. `weights` [B]
    are 0 for rows of padding and else 1."""
    ratios = policy - reference
    weights = jnp.ones_like(ratios) if weights is None else weights
    mean = (ratios * weights).sum() / jnp.maximum(weights.sum(), 1)
    return lax.stop_gradient(jnp.maximum(0.0, mean))


def kto(
    answers: Answers,
    z0: Array | float,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> Array:
    """The loss of each answer, [B]: eq. 8 of the paper with λ_D = good_weight and λ_U = bad_weight."""
    rewards = beta * (answers.ratios - z0)
    good = good_weight * jax.nn.sigmoid(-rewards)
    return jnp.where(answers.good, good, bad_weight * jax.nn.sigmoid(rewards))


def unpaired_apo(answers: Answers, beta: float = 0.1) -> Array:
    """KTO with z₀ = 0: APO-zero for answers without a partner (D'Oosterlinck et al. 2024,
    arXiv:2408.06266)."""
    return kto(answers, 0.0, beta)


def balanced_weights(good: int, bad: int, ratio: float = 1.0) -> tuple[float, float]:
    """(λ_D, λ_U) with λ_D · good = ratio · λ_U · bad, the smaller one 1.

    The paper asks for a ratio in [1, 4/3]. ValueError without both kinds, or for another ratio.
    """
    if good < 1 or bad < 1:
        raise ValueError(f"KTO needs good and bad answers; there are {good} and {bad}")
    if not 1 <= ratio <= 4 / 3:
        raise ValueError(f"the ratio of weighted good to bad answers is in [1, 4/3], not {ratio}")
    wanted = ratio * bad / good  # λ_D / λ_U
    return (wanted, 1.0) if wanted >= 1 else (1.0, 1 / wanted)
