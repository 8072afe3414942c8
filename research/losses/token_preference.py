"""Losses of preferences that look at single tokens of the answers.

`TokenPairs` holds what policy and reference say at each position of P rows with two answers each. Every
loss gives one value a pair, [P], and is DPO (`losses.preference`) in a limit that its docstring names.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from research.losses.preference import Pairs, dpo
from research.losses.rows import per_position
from research.types import Array, PyTree

TokenLoss = Callable[..., Array]


@struct.dataclass
class TokenPairs:
    """At each position of the rows, [P, T], in nats, and 0 where `answers` is.

    log_probs, reference   log π(y_t) and log π_ref(y_t) of the next token
    divergence             KL(π_ref ‖ π) of the two distributions of the next token
    collision              log Σ_v π(v)², of the mean probability of a token that π samples
    answers                1 where the next token is the chosen answer's, 2 the rejected one's, else 0
    """

    log_probs: Array
    reference: Array
    divergence: Array
    collision: Array
    answers: Array

    def of(self, values: Array) -> tuple[Array, Array]:
        """Sums [P] of values [P, T] over the chosen and over the rejected answer."""
        return tuple(jnp.where(self.answers == side, values, 0).sum(-1) for side in (1, 2))

    @property
    def lengths(self) -> tuple[Array, Array]:
        """Tokens of both answers, [P]; at least 1, as of a row of padding."""
        counts = self.of(jnp.ones_like(self.log_probs))
        return jnp.maximum(counts[0], 1), jnp.maximum(counts[1], 1)

    def pairs(self, weights: Array | float = 1.0) -> Pairs:
        """Whole answers, each token counting `weights` [P, T]."""
        policy, reference = self.of(weights * self.log_probs), self.of(weights * self.reference)
        return Pairs(*policy, *reference, *self.lengths)


def ld_dpo(tokens: TokenPairs, beta: float = 0.1, alpha: float = 0.5) -> Array:
    """DPO in which tokens beyond the shorter answer's length count α, the reference's too (Liu et al. 2024,
    arXiv:2409.06411). α = 1 is DPO; α = 0 compares answers of one length. ValueError unless 0 ≤ α ≤ 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"the weight of the longer answer's tail is in [0, 1], not {alpha}")
    shared = jnp.minimum(*tokens.lengths)[:, None]
    inside = [tokens.answers == side for side in (1, 2)]
    number = sum(jnp.where(x, jnp.cumsum(x, axis=-1), 0) for x in inside)  # 1 for the first token
    return dpo(tokens.pairs(jnp.where(number > shared, alpha, 1.0)), beta)


def wpo_weights(tokens: TokenPairs) -> Array:
    """exp(mean(log π(y_t) − log Σ_v π(v)²)) of both answers multiplied, at most 1, [P]; no gradient (Zhou et
    al. 2024, arXiv:2406.11827, eq. 2 with its sampled alignment; the bound is that of trl before 1.0).

    Near 1 for what the policy could have said itself, near 0 for what it never says.
    """
    sums = tokens.of(lax.stop_gradient(tokens.log_probs - tokens.collision))
    chosen, rejected = (x / n for x, n in zip(sums, tokens.lengths, strict=True))
    return jnp.exp(jnp.minimum(chosen + rejected, 0.0))


def wpo(tokens: TokenPairs, beta: float = 0.1) -> Array:
    """DPO of each pair times `wpo_weights`. Weights of 1 are DPO."""
    return wpo_weights(tokens) * dpo(tokens.pairs(), beta)


def tdpo1(tokens: TokenPairs, beta: float = 0.1) -> Array:
    """−log σ(βh − β(D_l − D_w)), D the sum of KL(π_ref ‖ π) over an answer's positions (Zeng et al. 2024,
    arXiv:2404.11999). With D_l = D_w it is DPO."""
    chosen, rejected = tokens.of(tokens.divergence)
    return -jax.nn.log_sigmoid(beta * (tokens.pairs().margin - (rejected - chosen)))


def tdpo2(tokens: TokenPairs, beta: float = 0.1, alpha: float = 0.5) -> Array:
    """−log σ(βh − αβ(D_l − sg D_w)): no gradient through the chosen answer's divergence.
    α = 0 is DPO; α = 1 has TDPO1's value."""
    chosen, rejected = tokens.of(tokens.divergence)
    excess = rejected - lax.stop_gradient(chosen)
    return -jax.nn.log_sigmoid(beta * (tokens.pairs().margin - alpha * excess))


def token_pairs(
    project: Callable[[PyTree, Array], tuple[Array, Array]],
    params: PyTree,
    hidden: Array,
    targets: Array,
    answers: Array,
    chunk: int | None = None,
) -> TokenPairs:
    """TokenPairs from states [P, T, D] of both models, without their logits [P, T, V].

    `project(params, hidden)` gives the logits [..., V] of the policy and of the reference. A chunk's logits
    are computed again by the backward pass; no gradient reaches the reference's.
    """

    def statistics(params: PyTree, hidden: Array, targets: Array) -> Array:
        policy, reference = project(params, hidden)
        if policy.shape != reference.shape:
            raise ValueError(
                f"the policy has {policy.shape[-1]} logits and the reference {reference.shape[-1]}"
            )
        return _statistics(policy.astype(jnp.float32), reference.astype(jnp.float32), targets)

    weights = (answers != 0).astype(jnp.float32)
    found = per_position(statistics, params, hidden, targets, weights, chunk)
    return TokenPairs(*jnp.moveaxis(found, -1, 0), answers)


def _statistics(policy: Array, reference: Array, targets: Array) -> Array:
    """[..., 4] of the logits [..., V] of both models."""
    policy, reference = jax.nn.log_softmax(policy), lax.stop_gradient(jax.nn.log_softmax(reference))
    picked = [jnp.take_along_axis(x, targets[..., None], -1)[..., 0] for x in (policy, reference)]
    divergence = (jnp.exp(reference) * (reference - policy)).sum(-1)
    return jnp.stack([*picked, divergence, jax.nn.logsumexp(2 * policy, axis=-1)], axis=-1)


TOKEN_LOSSES: dict[str, TokenLoss] = {
    "ld_dpo": ld_dpo,
    "wpo": wpo,
    "tdpo1": tdpo1,
    "tdpo2": tdpo2,
}
