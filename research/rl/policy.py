"""What training asks of a policy and its critic: log-probabilities, entropy and values of tokens.

The critic is one column on states: `value/` beside the decoder's own parameters reads the policy's states
(a shared trunk); `critic/` holds a decoder of its own with its `value/` (a separate one).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.losses.lm import token_log_probs_and_entropy
from research.objectives.model import head_params, project_with, states
from research.types import Array, Batch, Params

CRITIC = r"(value|critic)/.*"  # a path rule for `partition`


class Said(NamedTuple):
    """log_probs, entropy, values: [B, T] float32, 0 where the mask is 0; values all 0 without a critic."""

    log_probs: Array
    entropy: Array
    values: Array


def with_critic(params: Params, width: int, separate: bool = False) -> Params:
    """`params` with a critic that says 0 everywhere: on the policy's own states of `width`, or, separate,
    on those of a copy of the policy as it is now. ValueError when there is one already."""
    if "value" in params or "critic" in params:
        raise ValueError("the parameters have a critic already")
    value = {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros(1)}
    if not separate:
        return {**params, "value": value}
    return {**params, "critic": {**jax.tree.map(jnp.array, params), "value": value}}


def without_critic(params: Params) -> Params:
    """The policy's own parameters."""
    return {name: leaf for name, leaf in params.items() if name not in ("value", "critic")}


def said(
    model: Any,
    params: Params,
    batch: Batch,
    temperature: float | Array = 1.0,
    rng: Array | None = None,
    chunk: int | None = None,
) -> Said:
    """Of the rows of a rollout. The logits are divided by the temperature: this is the distribution
    that was sampled from, provided that no filter took tokens away."""
    policy = without_critic(params)
    hidden = states(model, policy, batch, rng)
    log_probs, entropy = token_log_probs_and_entropy(
        _tempered(model, temperature),
        head_params(policy),
        hidden,
        batch["targets"],
        batch["mask"],
        chunk,
    )
    values = jnp.zeros_like(log_probs)
    if "critic" in params:
        critic = params["critic"]
        trunk = {name: leaf for name, leaf in critic.items() if name != "value"}
        values = _values(critic["value"], states(model, trunk, batch, rng))
    elif "value" in params:
        values = _values(params["value"], hidden)
    return Said(log_probs, entropy, jnp.where(batch["mask"] != 0, values, 0))


def _values(value: Params, hidden: Array) -> Array:
    return (hidden.astype(jnp.float32) @ value["kernel"] + value["bias"])[..., 0]


def _tempered(model: Any, temperature: float | Array) -> Callable[[Params, Array], Array]:
    """`project_with` at a temperature, divided in float32 as the sampler does."""

    def project(head: Params, hidden: Array) -> Array:
        return project_with(model, head, hidden).astype(jnp.float32) / temperature

    return project


def scorer(model: Any, chunk: int | None = None) -> Callable[..., Said]:
    """`said` without dropout at the batch's `temperature`, compiled: (params, batch) -> Said."""
    return jax.jit(partial(_score, model, chunk))


def _score(model: Any, chunk: int | None, params: Params, batch: Batch) -> Said:
    return said(model, params, batch, batch["temperature"], None, chunk)
