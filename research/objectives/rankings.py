"""Reward models from orders of K answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.losses.reward import ranked
from research.models.heads import Head
from research.objectives.model import states
from research.types import Array, Batch, Mean, Objective, Params


def ranking(
    model: Any, head: Head, answers: int, loss: Callable[[Array], Array] = ranked
) -> Objective:
    """Σ weights · loss(scores [R, K], best first) of rows of K = `answers` answers. For K = 2 and the
    losses of `losses.reward` it is `reward`.

    The batch is that of `data.rankings.order_rows`, with pair_weights [R]. Metrics over rows of non-zero
    weight: loss, accuracy (of all pairs of a row; a tie counts half), best (the first has the highest
    score of all), score.
    """
    better, worse = jnp.triu_indices(answers, 1)

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        scores = order_scores(model, head, params, batch, answers, rng)
        losses, counted = loss(scores), (batch["pair_weights"] != 0).astype(jnp.float32)
        differences = scores[:, better] - scores[:, worse]
        found = {
            "loss": losses,
            "accuracy": ((jnp.sign(differences) + 1) / 2).mean(-1),
            "best": (scores[:, :1] > scores[:, 1:]).all(-1).astype(jnp.float32),
            "score": scores.mean(-1),
        }
        metrics = {name: Mean.of(value, counted) for name, value in found.items()}
        return (losses * batch["pair_weights"]).sum(), jax.lax.stop_gradient(metrics)

    return objective


def order_scores(
    model: Any, head: Head, params: Params, batch: Batch, answers: int, rng: Array | None = None
) -> Array:
    """What a head of one output says of each of the `answers` segments of each row, [R, K]."""
    hidden = states(model, params, batch, rng)
    segments = batch["segment_ids"]
    found = [head(params, hidden, segments == answer) for answer in range(1, answers + 1)]
    return jnp.concatenate(found, axis=-1)
