"""Text environments whose best policy is known: what a policy that learns has to reach.

A Task gives prompts and scores whole transcripts. Its vocabulary is its own: ids 0 … `size` − 1, of which
PAD and END have the same meaning everywhere. In a game the environment speaks too, between the policy's
turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

PAD, END, ASK = 0, 1, 2
DIGIT = 3  # the id of digit d is DIGIT + d
HIGHER, LOWER = 13, 14


class Transcript(NamedTuple):
    """`ids` after the prompt, of which `chosen` (1 or 0) are the policy's; `ended`: by itself."""

    prompt: list[int]
    ids: list[int]
    chosen: list[int]
    ended: bool

    @property
    def answer(self) -> list[int]:
        """What the policy said, without an END."""
        said = [i for i, mine in zip(self.ids, self.chosen, strict=True) if mine]
        return said[:-1] if said and said[-1] == END else said


class Task(NamedTuple):
    """prompts(rng, count) -> ids; score(transcripts) -> [B]; `best` is the score of the best policy.

    reply(transcript) -> what the environment says next, or None where it is over; asked between the
    `turns`. An answer has at most `max_tokens` a turn, and a row `length` + 1 tokens in all.
    """

    size: int
    prompts: Callable[[np.random.Generator, int], list[list[int]]]
    score: Callable[[Sequence[Transcript]], np.ndarray]
    best: float
    length: int
    max_tokens: int
    stop_ids: tuple[int, ...] = (END,)
    turns: int = 1
    reply: Callable[[Transcript], list[int] | None] | None = None


def _each(score: Callable[[Transcript], float]) -> Callable[[Sequence[Transcript]], np.ndarray]:
    return lambda transcripts: np.array([score(t) for t in transcripts], np.float32)


def _share(said: Sequence[int], wanted: Sequence[int]) -> float:
    """How much of `wanted` stands in its place; what is too much counts against it."""
    right = sum(a == b for a, b in zip(said, wanted, strict=False))
    return right / max(len(said), len(wanted), 1)


def copy(digits: int = 3, kinds: int = 4) -> Task:
    """Say the digits of the prompt again: 1 for all of them and an end."""

    def prompts(rng: np.random.Generator, count: int) -> list[list[int]]:
        drawn = rng.integers(0, kinds, (count, digits)) + DIGIT
        return [[ASK, *row.tolist(), ASK] for row in drawn]

    return Task(
        16,
        prompts,
        _each(lambda t: _share(t.answer, t.prompt[1:-1])),
        1.0,
        length=2 * digits + 2,
        max_tokens=digits + 1,
    )


def count_up(last: int = 6) -> Task:
    """Go on counting to `last` from the digit of the prompt: 2 → 3 4 5 6."""

    def prompts(rng: np.random.Generator, count: int) -> list[list[int]]:
        return [[ASK, DIGIT + int(d)] for d in rng.integers(0, last, count)]

    def score(t: Transcript) -> float:
        return _share(t.answer, list(range(t.prompt[1] + 1, DIGIT + last + 1)))

    return Task(16, prompts, _each(score), 1.0, length=last + 2, max_tokens=last + 1)


def add(most: int = 4) -> Task:
    """The sum of two digits up to `most`, as one digit (most ≤ 4): 1 or 0."""
    if not 1 <= most <= 4:
        raise ValueError(f"sums of one digit: most is in 1..4, not {most}")

    def prompts(rng: np.random.Generator, count: int) -> list[list[int]]:
        drawn = rng.integers(0, most + 1, (count, 2))
        return [[ASK, DIGIT + int(a), DIGIT + int(b), ASK] for a, b in drawn]

    def score(t: Transcript) -> float:
        a, b = (i - DIGIT for i in t.prompt[1:3])
        return float(t.answer == [DIGIT + a + b])

    return Task(16, prompts, _each(score), 1.0, length=5, max_tokens=2)


def guess(numbers: int = 7, turns: int = 3) -> Task:
    """Find a hidden number: after a wrong guess the environment says HIGHER or LOWER.

    Score: 1 less a tenth for each guess that was wrong, 0 if it is never found. Halving finds any of
    7 numbers in 3 guesses, one in the first and two in the second, which no policy beats.
    """
    depths = [_depth(n, numbers) for n in range(numbers)]
    best = float(np.mean([1 - 0.1 * (d - 1) if d <= turns else 0.0 for d in depths]))
    hidden = lambda t: -1 - t.prompt[1]  # noqa: E731

    def prompts(rng: np.random.Generator, count: int) -> list[list[int]]:
        return [[ASK, -1 - int(n)] for n in rng.integers(0, numbers, count)]

    def reply(t: Transcript) -> list[int] | None:
        said, number = t.ids[-1], hidden(t) + DIGIT
        if said == number:
            return None
        return [HIGHER if number > said else LOWER]

    def score(t: Transcript) -> float:
        wanted = hidden(t) + DIGIT
        return 1 - 0.1 * t.answer.index(wanted) if wanted in t.answer else 0.0

    return Task(
        16,
        prompts,
        _each(score),
        best,
        length=2 * turns + 1,
        max_tokens=1,
        stop_ids=(),
        turns=turns,
        reply=reply,
    )


def _depth(number: int, numbers: int) -> int:
    """Guesses that halving needs."""
    low, high, guesses = 0, numbers - 1, 1
    while (middle := (low + high) // 2) != number:
        low, high = (low, middle - 1) if number < middle else (middle + 1, high)
        guesses += 1
    return guesses


def visible(prompt: Sequence[int]) -> list[int]:
    """What the policy sees of a prompt: negative numbers are the environment's secret."""
    return [i for i in prompt if i >= 0]
