"""Multiple choice by the log-probability of each option, as language models are usually examined.

For each option three scores are compared: log p(option | prompt), that divided by the option's
tokens, and that divided by its UTF-8 bytes (like the length-normalised accuracy of the Language
Model Evaluation Harness, which counts characters and not the space before an option). The option
with the largest score is the answer; the first of equals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from research.evaluate.nll import continuation_log_probs
from research.types import Params

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Question:
    """`sequences[i]` is prompt and option i together; its option begins at token `starts[i]`."""

    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    bytes: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Proportion:
    """`correct` of `total`, with Wilson's 95 % interval."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.total)


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracy by raw, per-token and per-byte score; `log_probs` and `answers` question by question."""

    raw: Proportion
    per_token: Proportion
    per_byte: Proportion
    log_probs: tuple[tuple[float, ...], ...]
    answers: dict[str, tuple[int, ...]]


def wilson(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); (0, 1) bounds are never left."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"expected 0 <= correct <= total and total > 0, got {correct} of {total}")
    p, shrink = correct / total, 1 + z * z / total
    middle = (p + z * z / (2 * total)) / shrink
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def question(
    encode: Callable[[str], Sequence[int]], prompt: str, options: Sequence[str], answer: int
) -> Question:
    """Tokenize prompt + option as one text, as it would stand there.

    An option begins where its tokens leave those of the prompt alone: where the boundary merges
    into one token, that token belongs to the option. Options usually begin with their space.
    """
    if not 0 <= answer < len(options):
        raise ValueError(f"answer {answer} is not one of {len(options)} options")
    alone = list(encode(prompt))
    if not alone:
        raise ValueError(
            "the prompt has no tokens: the first token of an option needs one before it"
        )
    sequences, starts = [], []
    for number, option in enumerate(options):
        whole = list(encode(prompt + option))
        start = max(1, _shared(alone, whole))
        if start >= len(whole):
            raise ValueError(f"option {number} ({option!r}) adds no token to the prompt")
        sequences.append(tuple(whole))
        starts.append(start)
    lengths = tuple(len(option.encode()) for option in options)
    return Question(tuple(sequences), tuple(starts), lengths, answer)


def multiple_choice(
    model: Any, params: Params, questions: Sequence[Question], batch_size: int = 8
) -> ChoiceResult:
    """Answer every question. Options of all questions are batched together by length."""
    if not questions:
        raise ValueError("no questions")
    sequences = [ids for q in questions for ids in q.sequences]
    starts = [start for q in questions for start in q.starts]
    scores = continuation_log_probs(model, params, sequences, starts, batch_size)
    log_probs, answers = [], {"raw": [], "per_token": [], "per_byte": []}
    remaining = iter(scores)
    for q in questions:
        rows = [next(remaining) for _ in q.sequences]
        sums = np.array([row.sum(dtype=np.float64) for row in rows])
        log_probs.append(tuple(sums.tolist()))
        answers["raw"].append(int(sums.argmax()))
        answers["per_token"].append(int((sums / [len(row) for row in rows]).argmax()))
        answers["per_byte"].append(int((sums / np.array(q.bytes)).argmax()))
    hits = {
        name: Proportion(
            sum(a == q.answer for a, q in zip(chosen, questions, strict=True)), len(questions)
        )
        for name, chosen in answers.items()
    }
    return ChoiceResult(
        **hits,
        log_probs=tuple(log_probs),
        answers={name: tuple(chosen) for name, chosen in answers.items()},
    )


def answer_log_probs(
    model: Any,
    params: Params,
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    batch_size: int = 8,
) -> np.ndarray:
    """log p(answer | prompt) of each of some answers, token ids as `decode.answers` has them: [A]."""
    starts = [len(prompt)] * len(answers)
    sequences = [[*prompt, *answer] for answer in answers]
    rows = continuation_log_probs(model, params, sequences, starts, batch_size)
    return np.array([row.sum(dtype=np.float64) for row in rows])


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
