"""Single answers, each labelled good or bad, as training examples: what KTO learns from.

    {prompt, completion, label}       text, or for the prompt a list of messages; label true or false

An example becomes one row with two segments: the prompt with its own answer, and the same prompt with the
answer to another prompt, so that one forward pass gives both what the loss weighs and what its reference
point is made of. Partners are fixed with the data, so that a reference's log-probabilities of both can be
taken once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from research.data.formats import Message
from research.data.packing import Table, fill
from research.data.preferences import Preference, encoded, prompt_key, prompt_of
from research.data.rows import Row, RowError
from research.data.supervised import Encode, Example, shift


class Judged(NamedTuple):
    """What was asked, an answer as text, and whether it is a good one."""

    prompt: list[Message]
    answer: str
    good: bool


class JudgedExample(NamedTuple):
    """The answer after its prompt, and another prompt's answer in its place."""

    own: Example
    mismatched: Example
    good: bool


@dataclass(frozen=True)
class AnswerCounts:
    """What became of the answers: kept + empty + long_prompt == read; good + bad == kept."""

    read: int = 0
    kept: int = 0
    good: int = 0
    bad: int = 0
    empty: int = 0
    long_prompt: int = 0
    truncated: int = 0

    def __add__(self, other: AnswerCounts) -> AnswerCounts:
        mine, others = asdict(self), asdict(other)
        return AnswerCounts(**{name: mine[name] + others[name] for name in mine})


def judged(row: Row, place: str = "row") -> Judged:
    """The row of the layout above; RowError naming the place and the field otherwise."""
    if not isinstance(row, dict) or row.get("prompt") is None:
        raise RowError(f"{place}: expected an object with the field 'prompt'")
    if not isinstance(row.get("completion"), str):
        found = type(row.get("completion")).__name__
        raise RowError(f"{place}: field 'completion' must be text, got {found}")
    if not isinstance(row.get("label"), bool):
        raise RowError(f"{place}: field 'label' must be true or false, got {row.get('label')!r}")
    return Judged(prompt_of(row, place), row["completion"], row["label"])


def split_pairs(rows: Iterable[tuple[str, Preference]]) -> list[tuple[str, Judged]]:
    """Each pair as a good answer and a bad one, next to each other and both under the pair's place."""
    return [
        (place, Judged(pair.prompt, answer, good))
        for place, pair in rows
        for answer, good in ((pair.chosen, True), (pair.rejected, False))
    ]


def answers(
    rows: Iterable[tuple[str, Judged]], encode: Encode, max_length: int
) -> tuple[list[JudgedExample], AnswerCounts]:
    """Examples of at most `max_length` tokens an answer with its prompt, and what became of each.

    A longer answer loses its end. An empty one, or one whose prompt leaves no room for it, is left out; all
    are counted. Prompt i meets the answer of prompt i+1, or of the next that asks something else: pairs
    that were split have the same prompt twice. ValueError when nothing remains, or one prompt alone.
    """
    kept, counts = [], AnswerCounts()
    for place, row in rows:
        example, truncated = _example(row.prompt, row.answer, encode, place, max_length)
        counts += _counted(row, example, truncated)
        if example is not None:
            kept.append((place, row, example))
    if not kept:
        raise ValueError(f"no answer remains: {counts}")
    partners = _partners([prompt_key(row.prompt) for _, row, _ in kept])
    found = []
    for (place, row, own), partner in zip(kept, partners, strict=True):
        other, _ = _example(row.prompt, kept[partner][1].answer, encode, place, max_length)
        found.append(JudgedExample(own, other, row.good))
    return found, counts


def answer_rows(examples: Sequence[JudgedExample], length: int, pad_id: int = 0) -> Table:
    """Rows [P, length]: segment 1 is the answer after its prompt, segment 2 the mismatched one; and `good`
    [P] bool. ValueError naming an example that is longer than `length`."""
    for index, example in enumerate(examples):
        needed = len(example.own.tokens) + len(example.mismatched.tokens)
        if needed > length:
            raise ValueError(f"answer {index} needs {needed} tokens, more than the row's {length}")
    table = fill([(e.own, e.mismatched) for e in examples], length, pad_id)
    return table | {"good": np.array([e.good for e in examples], bool)}


def _example(
    prompt: Sequence[Message], answer: str, encode: Encode, place: str, max_length: int
) -> tuple[Example | None, bool]:
    """(the example, None without a supervised token; whether its end was cut off)."""
    if not answer.strip():
        return None, False
    ids, mask = encoded(prompt, answer, encode, place)
    example = shift(ids[:max_length], mask[:max_length])
    return (example if np.any(example.weights) else None), len(ids) > max_length


def _counted(row: Judged, example: Example | None, truncated: bool) -> AnswerCounts:
    if not row.answer.strip():
        return AnswerCounts(read=1, empty=1)
    if example is None:
        return AnswerCounts(read=1, long_prompt=1)
    good = int(row.good)
    return AnswerCounts(read=1, kept=1, good=good, bad=1 - good, truncated=int(truncated))


def _partners(prompts: Sequence[Any]) -> list[int]:
    """For each the next, round the end, that is another prompt."""
    count = len(prompts)
    following = list(range(count))
    for i in range(2 * count - 1, -1, -1):  # twice round, so that the end sees the start
        j = (i + 1) % count
        following[i % count] = j if prompts[j] != prompts[i % count] else following[j]
    alone = [i for i, j in enumerate(following) if prompts[i] == prompts[j]]
    if alone:
        raise ValueError(
            "all answers are to one prompt: KTO's reference point needs answers to other prompts"
        )
    return following
