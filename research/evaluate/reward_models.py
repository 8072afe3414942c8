"""What a reward model says of pairs it was not trained on, how sure it is, and how sure it may be."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from research.data import packing
from research.data.packing import Table
from research.evaluate.ranking import expected_calibration_error
from research.models.heads import Head
from research.objectives import answer_scores
from research.types import Array, Batch, Params


def pair_scores(model: Any, head: Head, params: Params, table: Table, rows: int = 4) -> np.ndarray:
    """Scores of the chosen and the rejected answer of every pair of the table, [P, 2], `rows` of it at a
    time."""
    fields = {name: table[name] for name in packing.FIELDS}
    parts = [_scored(model, head, params, batch) for batch in packing.batches(fields, rows)]
    return np.concatenate(jax.device_get(parts))[: len(table["tokens"])]


@partial(jax.jit, static_argnums=(0, 1))
def _scored(model: Any, head: Head, params: Params, batch: Batch) -> Array:
    return answer_scores(model, head, params, batch)


def pair_loss(margins: np.ndarray, temperature: float = 1.0) -> float:
    """Mean −log σ(margin / T) in nats, of margins r_w − r_l; ln 2 is chance."""
    return float(np.logaddexp(0, -np.asarray(margins, float) / temperature).mean())


def calibration_error(margins: np.ndarray, temperature: float = 1.0, bins: int = 10) -> float:
    """Expected calibration error of σ(|margin| / T), the model's belief that the answer it prefers is the
    chosen one; a margin of 0 is right by half."""
    margins = np.asarray(margins, float)
    sure = 1 / (1 + np.exp(-np.abs(margins) / temperature))
    return expected_calibration_error(sure, (np.sign(margins) + 1) / 2, bins)


def calibrated_temperature(margins: np.ndarray, steps: int = 100) -> float:
    """The T > 0 that minimises `pair_loss` of held-out margins (temperature scaling: Guo et al. 2017,
    arXiv:1706.04599, for two classes), by bisection of the slope in 1 / T.

    ValueError where there is none: all margins are of the right sign (T → 0), or they are no better than
    chance (their mean is not above 0, T → ∞).
    """
    margins = np.asarray(margins, float)
    if margins.ndim != 1 or not len(margins) or not np.isfinite(margins).all():
        raise ValueError(f"expected finite margins of one axis, not {margins.shape}")
    if margins.min() >= 0 or not margins.mean() > 0:
        raise ValueError(
            f"no temperature is best for margins of mean {margins.mean():.3g} and least {margins.min():.3g}: "
            "some must be wrong, and the mean above 0"
        )

    def slope(inverse: float) -> float:
        return float((-margins / (1 + np.exp(np.clip(inverse * margins, -700, 700)))).mean())

    low, high = 0.0, 1 / np.abs(margins).max()
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(2 / (low + high))
