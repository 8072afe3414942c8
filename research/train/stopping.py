"""Early stopping: end a run whose held-out metric no longer gets better (Prechelt 1998).

What it remembers, the best value so far and how many evaluations ago that was, goes into every
checkpoint: a run that is stopped and resumed ends at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass

from research.train.retention import Best


@dataclass(frozen=True)
class Waiting:
    """The best value of the metric, turned so that lower is better, and the evaluations since."""

    best: float = float("inf")
    evaluations: int = 0


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` evaluations in a row without a new best, better by more than `min_delta`.

    An evaluation that is nan is none. The parameters that come back are the last ones: those of the
    best evaluation are kept by `Training.keep_best`.
    """

    of: Best
    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self):
        if self.patience < 1:
            raise ValueError(f"EarlyStopping.patience must be at least 1, not {self.patience}")
        if self.min_delta < 0:
            raise ValueError(f"EarlyStopping.min_delta must be at least 0, not {self.min_delta}")

    def after(self, waiting: Waiting, evaluation: dict[str, float]) -> Waiting:
        """What is remembered after one more evaluation. KeyError when it lacks the metric."""
        value = self.of.of(evaluation)
        if value < waiting.best - self.min_delta:
            return Waiting(value)
        return Waiting(waiting.best, waiting.evaluations + 1)

    def stops(self, waiting: Waiting) -> bool:
        return waiting.evaluations >= self.patience
