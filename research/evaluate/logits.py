"""How large a model's logits are: what z-loss and max-z loss hold down.

Cross-entropy is blind to a constant that is added to all logits of a position, so that log Z can
drift; in low precision, and where sampling depends on the logits themselves, that matters (PaLM,
arXiv:2204.02311, section 5; Baichuan 2, arXiv:2309.10305).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.objectives import head_params, project_with, states
from research.types import Array, Batch, Params


@dataclass(frozen=True)
class LogitScale:
    """Means over positions: log Z = log Σ_v exp z_v in nats, and the largest logit max_v z_v."""

    log_partition: float
    largest: float


def logit_scale(model: Any, params: Params, batches: Iterable[Batch]) -> LogitScale:
    """Over the positions of non-zero weight in batches as `next_token` takes them, without dropout.

    A batch's logits [B, T, V] exist at once. ValueError when no position counts.
    """
    log_z = largest = count = 0.0
    for batch in batches:
        more = [float(part) for part in jax.device_get(_sums(model, params, batch))]
        log_z, largest, count = log_z + more[0], largest + more[1], count + more[2]
    if not count:
        raise ValueError("no position counts: there is no batch, or every weight is 0")
    return LogitScale(log_z / count, largest / count)


@partial(jax.jit, static_argnums=0)
def _sums(model: Any, params: Params, batch: Batch) -> tuple[Array, Array, Array]:
    logits = project_with(model, head_params(params), states(model, params, batch))
    counted = batch["weights"] != 0
    each = jax.nn.logsumexp(logits, axis=-1), logits.max(-1)
    log_z, largest = (jnp.where(counted, values, 0).sum() for values in each)
    return log_z, largest, counted.sum()
