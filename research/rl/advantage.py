"""Advantages of a rollout: what makes REINFORCE, actor–critic, PPO, RLOO and GRPO different methods.

reinforce   rewards still to come (Williams 1992)
baseline    the same less the mean over the batch
gae         a critic's (Schulman et al. 2015, arXiv:1506.02438): actor–critic and PPO
rloo        the whole answer's reward less the mean of the other answers to its prompt
grpo        less the mean of all answers to its prompt, over their deviation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from research.losses import advantages as parts
from research.types import Array

Kind = Literal["reinforce", "baseline", "gae", "rloo", "grpo"]


@dataclass(frozen=True)
class Estimator:
    """`whiten` brings advantages to mean 0 and deviation 1 over the batch (with 'gae' and 'baseline')."""

    kind: Kind = "gae"
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True

    def __post_init__(self):
        if self.kind not in ("reinforce", "baseline", "gae", "rloo", "grpo"):
            raise ValueError(f"no estimator of advantages {self.kind!r}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")

    @jax.jit(static_argnames=("self", "answers"))
    def __call__(
        self,
        rewards: Array,
        values: Array,
        mask: Array,
        answers: int = 1,
        last_value: Array | None = None,
    ) -> tuple[Array, Array]:
        """(advantages, returns) [B, T]; rows are prompts, each with its `answers` one after another."""
        if self.kind == "gae":
            found, returns = parts.gae(rewards, values, mask, self.gamma, self.lam, last_value)
            return (parts.whiten(found, mask) if self.whiten else found), returns
        returns = parts.gae(rewards, jnp.zeros_like(values), mask, self.gamma, 1.0, last_value)[0]
        if self.kind == "reinforce":
            return returns, returns
        if self.kind == "baseline":
            found = jnp.where(mask != 0, returns - parts.masked_mean(returns, mask), 0)
            return (parts.whiten(found, mask) if self.whiten else found), returns
        totals = jnp.where(mask != 0, rewards, 0).sum(1).reshape(-1, answers)
        of_answers = parts.leave_one_out if self.kind == "rloo" else parts.group_advantages
        return jnp.where(mask != 0, of_answers(totals).reshape(-1, 1), 0), returns
