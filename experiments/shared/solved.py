"""Training that ends once it is good enough: what an evaluation says, and early stopping that reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from research.train.retention import Best
from research.train.stopping import EarlyStopping

STOP = EarlyStopping(Best("unsolved_after", "highest"), patience=1)


class Solved:
    """Evaluates until the wanted value is there. What was drawn gets more until then, and no more after it,
    which is what ends the training."""

    def __init__(self, measure: Callable[[Any], float], wanted: float):
        self.measure, self.wanted = measure, wanted
        self.drawn, self.best, self.after = 0, -np.inf, None

    def __call__(self, params: Any) -> dict[str, float]:
        value = self.measure(params)
        self.best = max(self.best, value)
        if self.after is None and value >= self.wanted:
            self.after = self.drawn
        unsolved = self.drawn if self.after is None else -1
        return {"value": value, "unsolved_after": float(unsolved)}
