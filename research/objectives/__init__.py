"""Losses bound to models: what the training step differentiates.

An Objective is `(params, context, batch, rng) -> (loss, {name: Mean})`, see `research.types`.
"""

from research.objectives.model import head_outputs, head_params, project_with, states
from research.objectives.penalty import Penalty, with_penalty
from research.objectives.preferences import (
    answer_log_probs,
    answer_scores,
    answer_tokens,
    kto,
    preference,
    reward,
    token_preference,
)
from research.objectives.rankings import order_scores, ranking
from research.objectives.supervised import choose, classify, next_token, regress

__all__ = [
    "Penalty",
    "answer_log_probs",
    "answer_scores",
    "answer_tokens",
    "choose",
    "classify",
    "head_outputs",
    "head_params",
    "kto",
    "next_token",
    "order_scores",
    "preference",
    "project_with",
    "ranking",
    "regress",
    "reward",
    "states",
    "token_preference",
    "with_penalty",
]
