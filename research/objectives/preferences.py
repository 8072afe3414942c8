"""Objectives of pairs of answers, one better than the other: preference losses and reward models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.losses.lm import token_log_probs
from research.losses.preference import PairLoss, Pairs
from research.losses.reward import pairwise
from research.models.heads import Head
from research.objectives.model import head_params, project_with, states
from research.types import Array, Batch, Mean, Objective, Params


def preference(model: Any, loss: PairLoss, chunk: int | None = None) -> Objective:
    """Σ weights · loss of pairs of answers (`losses.preference`).

    The batch holds tokens, targets, weights, segment_ids and positions [P, T] as `data.preferences`
    lays pairs out; pair_weights [P]; and reference [P, 2], the reference's log-probabilities of both
    answers (`answer_log_probs`), where the loss looks at one. Metrics over pairs of non-zero weight: loss, accuracy
    (margin above 0), margin of log-ratios, and the two log-probabilities, chosen and rejected.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        sums, tokens = answer_log_probs(model, params, batch, rng, chunk)
        reference = batch.get("reference", jnp.zeros_like(sums))
        pairs = Pairs(*sums.T, *reference.T, *tokens.T)
        losses, counted = loss(pairs), (batch["pair_weights"] != 0).astype(jnp.float32)
        found = {
            "loss": losses,
            "accuracy": (pairs.margin > 0).astype(jnp.float32),
            "margin": pairs.margin,
            "chosen": pairs.chosen,
            "rejected": pairs.rejected,
        }
        metrics = {name: Mean.of(value, counted) for name, value in found.items()}
        return (losses * batch["pair_weights"]).sum(), jax.lax.stop_gradient(metrics)

    return objective


def reward(model: Any, head: Head, loss: Callable[[Array, Array], Array] = pairwise) -> Objective:
    """Σ weights · loss(scores of the chosen, of the rejected answers) of rows of pairs.

    The batch is that of `preference`, without a reference; the head reads the last token of each
    segment. Metrics over pairs of non-zero weight: loss, accuracy (a tie counts half), margin, score.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        chosen, rejected = answer_scores(model, head, params, batch, rng).T
        losses, counted = loss(chosen, rejected), (batch["pair_weights"] != 0).astype(jnp.float32)
        found = {
            "loss": losses,
            "accuracy": (jnp.sign(chosen - rejected) + 1) / 2,
            "margin": chosen - rejected,
            "score": (chosen + rejected) / 2,
        }
        metrics = {name: Mean.of(value, counted) for name, value in found.items()}
        return (losses * batch["pair_weights"]).sum(), jax.lax.stop_gradient(metrics)

    return objective


def answer_scores(
    model: Any, head: Head, params: Params, batch: Batch, rng: Array | None = None
) -> Array:
    """What a head of one output says of both answers of each row of pairs, [P, 2]."""
    hidden = states(model, params, batch, rng)
    both = [head(params, hidden, batch["segment_ids"] == answer) for answer in (1, 2)]
    return jnp.concatenate(both, axis=-1)


def answer_log_probs(
    model: Any, params: Params, batch: Batch, rng: Array | None = None, chunk: int | None = None
) -> tuple[Array, Array]:
    """(log-probabilities [P, 2] in nats, numbers of tokens [P, 2]) of the answers in rows of pairs; at
    least 1 token is counted, so that a row of padding divides by something."""
    hidden = states(model, params, batch, rng)
    project, head = partial(project_with, model), head_params(params)
    own = token_log_probs(project, head, hidden, batch["targets"], batch["weights"], chunk)
    inside = batch["segment_ids"][..., None] == jnp.array([1, 2])
    sums = jnp.where(inside, own[..., None], 0).sum(1)
    counts = (inside & (batch["weights"][..., None] != 0)).sum(1)
    return sums, jnp.maximum(counts, 1)
