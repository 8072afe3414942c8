"""The loss of a minibatch of rollouts, for PPO and for the plain policy gradient alike.

    loss = policy + value_weight · values − entropy_weight · entropy + kl_weight · KL(policy ‖ reference)
           + pretrain_weight · cross-entropy of other rows (PPO-ptx, Ouyang et al. 2022, arXiv:2203.02155)

What differs between REINFORCE, actor–critic, RLOO, GRPO and PPO beyond this is how `advantages` were made
(`research.rl.advantage`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from research.losses import policy as losses
from research.losses.advantages import kl_estimate, masked_mean
from research.objectives import next_token
from research.rl.policy import Said, said, without_critic
from research.types import Array, Batch, Mean, Objective, Params

EDGES = (0.8, 0.9, 1.1, 1.2)  # of the histogram of ratios


@dataclass(frozen=True)
class Loss:
    """kind 'ppo' clips the ratio, 'reinforce' has no ratio. `kl_weight` puts the estimate `kl_kind` into
    the loss, as GRPO does, instead of into the rewards; k2's gradient is that of the KL."""

    kind: Literal["ppo", "reinforce"] = "ppo"
    clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_weight: float = 0.1
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    kl_kind: str = "k3"
    pretrain_weight: float = 0.0

    def __post_init__(self):
        if self.kind not in ("ppo", "reinforce"):
            raise ValueError(f"a policy loss is 'ppo' or 'reinforce', not {self.kind!r}")
        kl_estimate(jnp.zeros(1), jnp.zeros(1), self.kl_kind)  # says which kinds there are


def policy_gradient(model: Any, loss: Loss = Loss(), chunk: int | None = None) -> Objective:
    """The objective of a batch of `research.rl.source`: tokens, targets, segment_ids, mask, log_probs,
    values, advantages, returns and weights [B, T], the weights the mask over its sum in the whole step;
    `reference` where there is one; the temperature of sampling; pretrain_{tokens, targets, weights, ...} where there are such rows; scalars whose name
    begins with rollout/, which are reported as they are.
    """
    of_language = next_token(model, chunk=chunk)

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        # Without dropout: the old log-probabilities were taken without it.
        found = said(model, params, batch, batch["temperature"], None, chunk)
        total, metrics = terms(found, batch, loss)
        rest = {k.removeprefix("pretrain_"): v for k, v in batch.items() if k[:9] == "pretrain_"}
        if rest:
            value, more = of_language(without_critic(params), context, rest, rng)
            total += loss.pretrain_weight * value
            metrics["pretrain_loss"] = more["loss"]
        return total, metrics

    return objective


def terms(found: Said, batch: Batch, loss: Loss) -> tuple[Array, dict[str, Mean]]:
    """(loss, metrics) of what policy and critic say of a batch; the model does not matter here."""
    mask, count = batch["mask"], jnp.sum(batch["mask"] != 0).astype(jnp.float32)
    if loss.kind == "ppo":
        value, more = losses.ppo(
            found.log_probs,
            batch["log_probs"],
            batch["advantages"],
            mask,
            loss.clip,
            loss.dual_clip,
        )
    else:
        value, more = losses.reinforce(found.log_probs, batch["advantages"], mask)
    values, of_values = losses.values(
        found.values, batch["values"], batch["returns"], mask, loss.value_clip
    )
    entropy = masked_mean(found.entropy, mask)
    total = value + loss.value_weight * values - loss.entropy_weight * entropy
    more |= of_values | {"policy_loss": value, "entropy": entropy}
    if "reference" in batch:
        kl = masked_mean(kl_estimate(found.log_probs, batch["reference"], loss.kl_kind), mask)
        total, more = total + loss.kl_weight * kl, more | {"reference_kl": kl}
    elif loss.kl_weight:
        raise ValueError("kl_weight needs a reference policy: give one to the source")
    more |= histogram(lax.stop_gradient(found.log_probs - batch["log_probs"]), mask)
    # A micro-batch's share of the step: means over all tokens come out of adding.
    share = batch["weights"].sum()
    metrics = {name: Mean(x * count, count) for name, x in lax.stop_gradient(more).items()}
    one = jnp.ones([])
    metrics |= {
        k: Mean(jnp.asarray(v, jnp.float32), one) for k, v in batch.items() if k[:8] == "rollout/"
    }
    return share * total, metrics


def histogram(difference: Array, mask: Array) -> dict[str, Array]:
    """Shares of tokens by their ratio π/π_old, from the difference of log-probabilities."""
    edges = (-jnp.inf, *map(math.log, EDGES), jnp.inf)
    names = ["below 0.8", "0.8 to 0.9", "0.9 to 1.1", "1.1 to 1.2", "above 1.2"]
    inside = [(difference >= a) & (difference < b) for a, b in pairwise(edges)]
    return {
        f"ratio/{name}": masked_mean(x.astype(jnp.float32), mask)
        for name, x in zip(names, inside, strict=True)
    }
