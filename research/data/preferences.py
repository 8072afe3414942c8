"""Pairs of answers, one better than the other, as training examples.

A row says what was asked and two answers to it, in one of three layouts:

    {conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}, system?}   LLaMA-Factory
    {prompt, chosen, rejected}           text, or for the prompt a list of messages
    {chosen: [messages], rejected: [messages]}       alike but for the last, the answer

Only the two answers are supervised: earlier turns of the assistant are part of the prompt. A pair becomes
one row with two segments, the chosen answer first, so that both are read in one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from research.data import formats
from research.data.formats import Message
from research.data.packing import Table, fill
from research.data.rows import Row, RowError
from research.data.supervised import Encode, Example, shift


class Preference(NamedTuple):
    """What was asked, and two answers as text."""

    prompt: list[Message]
    chosen: str
    rejected: str


class ExamplePair(NamedTuple):
    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class PairCounts:
    """What became of the pairs: kept + identical_dropped + empty + long_prompt == read."""

    read: int = 0
    kept: int = 0
    identical: int = 0
    identical_dropped: int = 0
    empty: int = 0
    long_prompt: int = 0
    truncated: int = 0

    def __add__(self, other: PairCounts) -> PairCounts:
        mine, others = asdict(self), asdict(other)
        return PairCounts(**{name: mine[name] + others[name] for name in mine})


def preference(row: Row, place: str = "row") -> Preference:
    """The row in any of the layouts above; RowError naming the place and the field otherwise."""
    if not isinstance(row, dict) or row.get("chosen") is None or row.get("rejected") is None:
        raise RowError(f"{place}: expected an object with the fields 'chosen' and 'rejected'")
    if row.get("conversations") is not None:
        asked = {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
        prompt = formats.sharegpt(asked, place)
        return Preference(prompt, *(_turn(row, field, place) for field in ("chosen", "rejected")))
    if row.get("prompt") is not None:
        return Preference(
            prompt_of(row, place), *(_text(row, f, place) for f in ("chosen", "rejected"))
        )
    return _whole_conversations(row, place)


def prompt_of(row: Row, place: str) -> list[Message]:
    """The messages of the field `prompt`, which may be the text of one."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return formats.messages({"messages": prompt}, f"{place}: prompt")


def _whole_conversations(row: Row, place: str) -> Preference:
    both = [
        formats.messages({"messages": row[field]}, f"{place}: {field}")
        for field in ("chosen", "rejected")
    ]
    chosen, rejected = both
    if chosen[:-1] != rejected[:-1] or any(x[-1]["role"] != "assistant" for x in both):
        raise RowError(
            f"{place}: 'chosen' and 'rejected' must be equal up to a last message of the assistant"
        )
    return Preference(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _turn(row: Row, field: str, place: str) -> str:
    turn = row[field]
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise RowError(f"{place}: field {field!r} must be {{from, value}} with a text")
    if formats.SHAREGPT_ROLES.get(turn.get("from")) != "assistant":
        raise RowError(f"{place}: field {field!r} is from {turn.get('from')!r}, not an assistant")
    return turn["value"]


def _text(row: Row, field: str, place: str) -> str:
    if not isinstance(row[field], str):
        raise RowError(f"{place}: field {field!r} must be text, got {type(row[field]).__name__}")
    return row[field]


def pairs(
    rows: Iterable[tuple[str, Preference]],
    encode: Encode,
    max_length: int,
    drop_identical: bool = False,
) -> tuple[list[ExamplePair], PairCounts]:
    """Examples of at most `max_length` tokens an answer with its prompt, and what became of each pair.

    A longer answer loses its end. A pair with an empty answer, or whose prompt leaves no room for one, is
    left out; one with equal answers is kept, for it says that they are equally good, unless
    `drop_identical`. All are counted. ValueError when nothing remains.
    """
    kept, counts = [], PairCounts()
    for place, row in rows:
        pair, count = _pair(row, encode, place, max_length, drop_identical)
        counts += count
        if pair is not None:
            kept.append(pair)
    if not kept:
        raise ValueError(f"no pair of answers remains: {counts}")
    return kept, counts


def _pair(
    row: Preference, encode: Encode, place: str, max_length: int, drop_identical: bool
) -> tuple[ExamplePair | None, PairCounts]:
    if not row.chosen.strip() or not row.rejected.strip():
        return None, PairCounts(read=1, empty=1)
    identical = int(row.chosen == row.rejected)
    if identical and drop_identical:
        return None, PairCounts(read=1, identical=1, identical_dropped=1)
    both = [encoded(row.prompt, answer, encode, place) for answer in (row.chosen, row.rejected)]
    truncated = int(any(len(ids) > max_length for ids, _ in both))
    pair = ExamplePair(*(shift(ids[:max_length], mask[:max_length]) for ids, mask in both))
    if not all(np.any(example.weights) for example in pair):
        return None, PairCounts(read=1, identical=identical, long_prompt=1)
    return pair, PairCounts(read=1, kept=1, identical=identical, truncated=truncated)


def encoded(
    prompt: Sequence[Message], answer: str, encode: Encode, place: str
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) [T] of a conversation that ends in `answer`, the only turn to be learned."""
    silent = [{**m, "loss_weight": 0.0} if m["role"] == "assistant" else m for m in prompt]
    try:
        return encode([*silent, {"role": "assistant", "content": answer}])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def pair_rows(examples: Sequence[ExamplePair], length: int, pad_id: int = 0) -> Table:
    """Rows [P, length]: segment 1 is the chosen answer after its prompt, segment 2 the rejected one.

    ValueError naming a pair that is longer than `length`.
    """
    for index, pair in enumerate(examples):
        needed = sum(len(example.tokens) for example in pair)
        if needed > length:
            raise ValueError(f"pair {index} has {needed} tokens, more than the row's {length}")
    return fill(examples, length, pad_id)


def overlap(train: Iterable[Preference], held_out: Iterable[Preference]) -> list[Preference]:
    """The held-out pairs whose prompt is one of the training prompts: leaks between splits."""
    seen = {prompt_key(row.prompt) for row in train}
    return [row for row in held_out if prompt_key(row.prompt) in seen]


def prompt_key(prompt: Sequence[Message]) -> tuple[Any, ...]:
    """Equal for prompts that differ in white space only."""
    return tuple((m["role"], " ".join(m["content"].split())) for m in prompt)
