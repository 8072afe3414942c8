"""Orders of several answers, answers with scores, and questions with options, as orders or as pairs.

    {prompt, answers: [best, ..., worst]}      an order (InstructGPT: Ouyang et al. 2022, arXiv:2203.02155)
    {prompt, answer, score}                    one answer of a prompt a row

The prompt is text or a list of messages. An order becomes K(K − 1)/2 pairs, or one row of K segments for
`objectives.ranking`. Pairs go on as those of `data.preferences`, whose `overlap` finds leaks between splits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from research.data import preferences
from research.data.corpora import Question
from research.data.formats import Message
from research.data.packing import Table, fill
from research.data.preferences import Preference
from research.data.rows import Row, RowError
from research.data.supervised import Encode, Example, shift


class Ranking(NamedTuple):
    """What was asked, and answers to it, best first."""

    prompt: list[Message]
    answers: tuple[str, ...]


class Scored(NamedTuple):
    """What was asked, one answer, and how good it is; greater is better."""

    prompt: list[Message]
    answer: str
    score: float


@dataclass(frozen=True)
class OrderCounts:
    """What became of the orders: kept + empty + long_prompt == read."""

    read: int = 0
    kept: int = 0
    empty: int = 0
    long_prompt: int = 0
    truncated: int = 0

    def __add__(self, other: OrderCounts) -> OrderCounts:
        mine, others = asdict(self), asdict(other)
        return OrderCounts(**{name: mine[name] + others[name] for name in mine})


@dataclass(frozen=True)
class PairStatistics:
    """Of `pairs` about `prompts` different prompts: median characters of both answers, how often the
    chosen one is the longer (a tie counts half), how many have equal answers."""

    pairs: int
    prompts: int
    chosen_characters: float
    rejected_characters: float
    chosen_longer: float
    identical: int


def ranking(row: Row, place: str = "row") -> Ranking:
    """RowError naming the place and the field for fewer than 2 answers, one that is no text, or one that
    comes twice: it cannot be better than itself."""
    prompt, answers = _prompt(row, "answers", place), row["answers"]
    if not isinstance(answers, list | tuple) or len(answers) < 2:
        raise RowError(f"{place}: field 'answers' must be a list of 2 texts or more, best first")
    seen: dict[str, int] = {}
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            kind = type(answer).__name__
            raise RowError(f"{place}: answers[{index}] must be text, got {kind}")
        if answer in seen:
            raise RowError(f"{place}: answers[{index}] is answers[{seen[answer]}] again")
        seen[answer] = index
    return Ranking(prompt, tuple(answers))


def scored(row: Row, place: str = "row") -> Scored:
    """RowError naming the place and the field for an answer that is no text, or a score that is no finite
    number."""
    prompt = _prompt(row, "answer", place)
    answer, score = row["answer"], row.get("score")
    if not isinstance(answer, str):
        raise RowError(f"{place}: field 'answer' must be text, got {type(answer).__name__}")
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if not number or not math.isfinite(score):
        raise RowError(f"{place}: field 'score' must be a finite number, got {score!r}")
    return Scored(prompt, answer, float(score))


def _prompt(row: Row, field: str, place: str) -> list[Message]:
    for name in ("prompt", field):
        if not isinstance(row, dict) or row.get(name) is None:
            raise RowError(f"{place}: expected an object with the fields 'prompt' and {field!r}")
    only = {"prompt": row["prompt"], "chosen": "", "rejected": ""}
    return preferences.preference(only, place).prompt


def ranking_pairs(order: Ranking) -> list[Preference]:
    """Each answer above each one after it."""
    return [Preference(order.prompt, a, b) for a, b in combinations(order.answers, 2)]


def choice_pairs(question: Question) -> list[Preference]:
    """The right option above each wrong one of a multiple-choice question (`corpora.multiple_choice`)."""
    prompt = [{"role": "user", "content": question.question}]
    right = question.options[question.answer]
    return [Preference(prompt, right, each) for each in question.options if each != right]


def scored_pairs(
    rows: Iterable[tuple[str, Scored]], difference: float
) -> list[tuple[str, Preference]]:
    """All pairs of answers to one prompt whose scores differ by `difference` or more, above 0; a pair's
    place names both rows, the better one first.

    ValueError when there are none.
    """
    if not difference > 0:
        raise ValueError(f"the least difference of two scores must be above 0, not {difference}")
    of_prompt: dict[str, list[tuple[str, Scored]]] = {}
    for place, row in rows:
        of_prompt.setdefault(repr(row.prompt), []).append((place, row))
    found = []
    for same in of_prompt.values():
        for pair in combinations(same, 2):
            (a, better), (b, worse) = sorted(pair, key=lambda item: -item[1].score)
            if better.score - worse.score >= difference:
                preference = Preference(better.prompt, better.answer, worse.answer)
                found.append((f"{a} over {b}", preference))
    if not found:
        raise ValueError(f"no two answers to one prompt differ by {difference} or more")
    return found


def orders(
    rows: Iterable[tuple[str, Ranking]], encode: Encode, max_length: int
) -> tuple[list[tuple[Example, ...]], OrderCounts]:
    """Examples of at most `max_length` tokens an answer with its prompt, and what became of each order.

    A longer answer loses its end. An order with an empty answer, or whose prompt leaves no room for one,
    is left out. ValueError when nothing remains, and naming the place where `encode` raises one.
    """
    kept, counts = [], OrderCounts()
    for place, row in rows:
        order, count = _order(row, encode, place, max_length)
        counts += count
        if order is not None:
            kept.append(order)
    if not kept:
        raise ValueError(f"no order of answers remains: {counts}")
    return kept, counts


def _order(
    row: Ranking, encode: Encode, place: str, max_length: int
) -> tuple[tuple[Example, ...] | None, OrderCounts]:
    if not all(answer.strip() for answer in row.answers):
        return None, OrderCounts(read=1, empty=1)
    silent = [{**m, "loss_weight": 0.0} if m["role"] == "assistant" else m for m in row.prompt]
    try:
        found = [encode([*silent, {"role": "assistant", "content": a}]) for a in row.answers]
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    examples = tuple(shift(ids[:max_length], mask[:max_length]) for ids, mask in found)
    if not all(np.any(example.weights) for example in examples):
        return None, OrderCounts(read=1, long_prompt=1)
    truncated = int(any(len(ids) > max_length for ids, _ in found))
    return examples, OrderCounts(read=1, kept=1, truncated=truncated)


def order_rows(examples: Sequence[tuple[Example, ...]], length: int, pad_id: int = 0) -> Table:
    """Rows [R, length]: segment k is the k-th best answer after its prompt, for `source.pair_source`.

    ValueError for orders of different numbers of answers, and naming one longer than `length`.
    """
    if len(numbers := {len(order) for order in examples}) != 1:
        raise ValueError(f"orders have {sorted(numbers)} answers; expected one number")
    for index, order in enumerate(examples):
        if (needed := sum(len(each.tokens) for each in order)) > length:
            raise ValueError(f"order {index} has {needed} tokens, more than the row's {length}")
    return fill(examples, length, pad_id)


def statistics(pairs: Sequence[Preference]) -> PairStatistics:
    """What is to be known of pairs before training on them; ValueError when there are none."""
    if not pairs:
        raise ValueError("there are no pairs")
    sizes = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    chosen, rejected = np.median(sizes, axis=0)
    return PairStatistics(
        pairs=len(pairs),
        prompts=len({repr(pair.prompt) for pair in pairs}),
        chosen_characters=float(chosen),
        rejected_characters=float(rejected),
        chosen_longer=float(np.mean((np.sign(sizes[:, 0] - sizes[:, 1]) + 1) / 2)),
        identical=sum(pair.chosen == pair.rejected for pair in pairs),
    )
