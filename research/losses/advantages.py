"""From rewards to advantages: masks, whitening, penalties for leaving the reference, GAE.

Arrays are [B, T] over the tokens of an answer (an episode's steps); `mask` is 1 where a token belongs to
it. What lies outside is 0 in every result.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from research.types import Array


def masked_mean(x: Array, mask: Array) -> Array:
    """Mean over the entries of non-zero mask; 0 where there is none."""
    return jnp.where(mask != 0, x, 0).sum() / jnp.maximum((mask != 0).sum(), 1)


def masked_variance(x: Array, mask: Array, unbiased: bool = True) -> Array:
    """Variance over those entries, divided by their number less one when `unbiased`; 0 for one alone."""
    count = (mask != 0).sum()
    squares = masked_mean(jnp.square(x - masked_mean(x, mask)), mask)
    return squares * jnp.where(unbiased & (count > 1), count / jnp.maximum(count - 1, 1), 1)


def whiten(x: Array, mask: Array, shift: bool = True, unbiased: bool = True) -> Array:
    """(x − mean) / sqrt(variance + 1e-8) over the mask; without `shift` the mean is added again."""
    mean = masked_mean(x, mask)
    scaled = (x - mean) * lax.rsqrt(masked_variance(x, mask, unbiased) + 1e-8)
    return jnp.where(mask != 0, scaled if shift else scaled + mean, 0)


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_value: Array | None = None,
) -> tuple[Array, Array]:
    """(advantages, returns) of generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438).

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1};  returns = A + V. The steps of an episode are the
    places of its mask, one after another: what an environment says in between is passed over. Beyond
    the last of them V is 0: the episode is over; or `last_value` [B], the value of the state where it was
    cut off.
    """
    real = mask != 0
    rewards, values = jnp.where(real, rewards, 0), jnp.where(real, values, 0)
    end = jnp.zeros_like(values[:, 0]) if last_value is None else last_value

    def back(carry: tuple[Array, Array], step: tuple[Array, ...]):
        (after, following), (reward, value, here) = carry, step
        advantage = reward + gamma * following - value + gamma * lam * after
        carry = jnp.where(here, advantage, after), jnp.where(here, value, following)
        return carry, advantage

    start = jnp.zeros_like(end), end.astype(values.dtype)
    _, advantages = lax.scan(back, start, (rewards.T, values.T, real.T), reverse=True)
    advantages = jnp.where(real, advantages.T, 0)
    return advantages, jnp.where(real, advantages + values, 0)


def reward_to_go(rewards: Array, mask: Array, gamma: float = 1.0) -> Array:
    """Σ_{k ≥ t} γ^(k−t) r_k: GAE with λ = 1 and no values."""
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)[0]


def kl_estimate(policy: Array, reference: Array, kind: str = "k1") -> Array:
    """KL(π ‖ π_ref) of each sampled token from its two log-probabilities, nats (Schulman 2020,
    joschu.net/blog/kl-approx.html).

    With x = log π_ref − log π: k1 = −x, unbiased, of either sign; k2 = x²/2, biased, its gradient that of
    the KL; k3 = e^x − 1 − x, unbiased and never negative. ValueError for another kind.
    """
    x = reference - policy
    kinds = {"k1": -x, "k2": jnp.square(x) / 2, "k3": jnp.expm1(jnp.minimum(x, 80.0)) - x}
    if kind not in kinds:
        raise ValueError(f"an estimator of the KL is one of {', '.join(kinds)}, not {kind!r}")
    return kinds[kind]


def shaped_rewards(score: Array, kl: Array, mask: Array, coefficient: Array | float) -> Array:
    """−β kl_t, and the answer's score [B] at the last token of its mask."""
    real = mask != 0
    left = jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1]  # with this one
    return jnp.where(real, -coefficient * kl, 0) + jnp.where(real & (left == 1), score[:, None], 0)


def group_advantages(scores: Array, deviation: bool = True) -> Array:
    """GRPO (Shao et al. 2024, arXiv:2402.03300): scores [prompts, answers] less their group's mean and,
    with `deviation`, over its sample standard deviation (plus 1e-4). ValueError for one answer a prompt."""
    if scores.shape[-1] < 2:
        raise ValueError("a group is 2 answers or more to a prompt")
    centred = scores - scores.mean(-1, keepdims=True)
    return centred / (scores.std(-1, ddof=1, keepdims=True) + 1e-4) if deviation else centred


def leave_one_out(scores: Array) -> Array:
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740): each score less the mean of the other answers to its
    prompt, [prompts, answers]. ValueError for one answer a prompt."""
    count = scores.shape[-1]
    if count < 2:
        raise ValueError("leave-one-out needs 2 answers or more to a prompt")
    return (scores - scores.mean(-1, keepdims=True)) * count / (count - 1)


def adaptive_coefficient(
    coefficient: Array | float,
    kl: Array | float,
    target: float,
    episodes: int,
    horizon: int = 10_000,
) -> Array:
    """β (1 + clip(KL/target − 1, −0.2, 0.2) · episodes / horizon), KL in nats an answer (Ziegler et al.
    2019, arXiv:1909.08593, §2.2)."""
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coefficient * (1 + error * episodes / horizon)
