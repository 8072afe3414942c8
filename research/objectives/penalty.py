"""A term that is added to an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from research.types import Array, Batch, Mean, Objective, Params

# (params, context, rng) -> (value, {name: Mean}): EWC, L2 to the start, ...
Penalty = Callable[[Params, Any, Array], tuple[Array, dict[str, Mean]]]


def with_penalty(objective: Objective, penalty: Penalty) -> Objective:
    """The objective plus `penalty(params, context, rng)`; both report their metrics.

    A penalty does not scale with the batch: where a step is split into n parts that are added, it
    must be given as 1/n of its value.
    """

    def penalised(params: Params, context: Any, batch: Batch, rng: Array | None):
        loss, metrics = objective(params, context, batch, rng)
        value, more = penalty(params, context, rng)
        clash = metrics.keys() & more.keys()
        if clash:
            raise ValueError(f"penalty and objective both report {sorted(clash)}")
        return loss + value, metrics | more

    return penalised
