"""Losses of policy gradients and of values, over [B, T] tokens with a mask. -> (loss, {name: value}).

Losses are means over the tokens of the mask. `ratio` is π_new/π_old of the sampled token. Both sides of
a ratio must be made by the same function at the same temperature: see `research.losses.advantages` for
what goes in.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from research.losses.advantages import masked_mean
from research.types import Array


def ppo(
    new: Array,
    old: Array,
    advantages: Array,
    mask: Array,
    clip: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """max(−A r, −A clip(r, 1−ε, 1+ε)): PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7), from log-
    probabilities of the sampled tokens. `dual_clip` c > 1 bounds it by −cA where A < 0 (Ye et al. 2020,
    arXiv:1912.09729). ValueError for a clip not above 0 or a dual clip not above 1."""
    if clip <= 0 or (dual_clip is not None and dual_clip <= 1):
        raise ValueError(f"clip must be above 0 and dual_clip above 1, not {clip} and {dual_clip}")
    difference = jnp.where(mask != 0, new - old, 0)
    ratio = jnp.exp(jnp.minimum(difference, 80.0))
    plain, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    losses = jnp.maximum(plain, clipped)
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual_clip), losses)
    metrics = {
        "ratio": masked_mean(ratio, mask),
        "clip_fraction": masked_mean((clipped > plain).astype(jnp.float32), mask),
        "approximate_kl": masked_mean(jnp.square(difference) / 2, mask),
    }
    return masked_mean(losses, mask), lax.stop_gradient(metrics)


def reinforce(new: Array, advantages: Array, mask: Array) -> tuple[Array, dict[str, Array]]:
    """−A log π (Williams 1992): with returns as A REINFORCE, less a baseline the same with less variance,
    with GAE the actor of actor–critic."""
    return masked_mean(-advantages * new, mask), {}


def values(
    new: Array, old: Array, returns: Array, mask: Array, clip: float | None = 0.2
) -> tuple[Array, dict[str, Array]]:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²); without a clip ½ (V − R)²."""
    errors = jnp.square(new - returns)
    bounded = (
        errors if clip is None else jnp.square(jnp.clip(new, old - clip, old + clip) - returns)
    )
    metrics = {
        "value_error": masked_mean(errors, mask),
        "value_clip_fraction": masked_mean((bounded > errors).astype(jnp.float32), mask),
    }
    return 0.5 * masked_mean(jnp.maximum(errors, bounded), mask), lax.stop_gradient(metrics)


def explained_variance(predicted: Array, returns: Array, mask: Array) -> Array:
    """1 − Var(R − V) / Var(R) over the mask: 1 is perfect, 0 no better than a constant."""
    rest = returns - predicted
    spread = masked_mean(jnp.square(returns - masked_mean(returns, mask)), mask)
    left = masked_mean(jnp.square(rest - masked_mean(rest, mask)), mask)
    return 1 - left / jnp.maximum(spread, 1e-12)
