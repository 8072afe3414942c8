"""Which of two answers a model holds to be better, over rows of pairs (`data.preferences`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from research.data import packing
from research.data.packing import Table
from research.evaluate.ranking import pairwise_accuracy
from research.objectives import answer_log_probs
from research.types import Params


@dataclass(frozen=True)
class Answered:
    """Of P pairs, chosen answer first: log-probabilities in nats and numbers of tokens, [P, 2]."""

    log_probs: np.ndarray
    tokens: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer is the likelier."""
        return pairwise_accuracy(*self.log_probs.T)

    @property
    def accuracy_per_token(self) -> float:
        """The same by log-probability a token, which does not favour short answers."""
        return pairwise_accuracy(*(self.log_probs / self.tokens).T)


@partial(jax.jit, static_argnames="model")
def _scored(model: Any, params: Params, batch: dict[str, Any]) -> tuple:
    return answer_log_probs(model, params, batch)


def answered(model: Any, params: Params, table: Table, rows: int = 4) -> Answered:
    """What the model gives every pair of the table, `rows` of it at a time."""
    fields = {name: table[name] for name in packing.FIELDS}
    parts = [_scored(model, params, batch) for batch in packing.batches(fields, rows)]
    count = len(table["tokens"])
    log_probs, tokens = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    return Answered(log_probs, tokens)


def margins(policy: Answered, reference: Answered) -> np.ndarray:
    """h of each pair, [P] nats: how much more than the reference the policy prefers the chosen answer."""
    ratios = policy.log_probs - reference.log_probs
    return ratios[:, 0] - ratios[:, 1]
