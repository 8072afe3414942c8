"""Conversations as training examples: tokens, the tokens after them, and loss weights.

Targets are shifted here, once: targets[t] is the token after tokens[t], and weights[t] belongs to
predicting it. The last token of an example has nothing after it in the same example: its weight
is 0, so that in a packed row no label crosses from one example to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Truncate = Literal["right", "left", "drop", "error"]
Encode = Callable[[list[dict[str, Any]]], tuple[np.ndarray, np.ndarray]]


class Example(NamedTuple):
    """One example, each array [T]: tokens and targets int32, weights float32."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Counts:
    """What became of the conversations: kept + dropped_long + dropped_unsupervised == read."""

    read: int = 0
    kept: int = 0
    truncated: int = 0
    dropped_long: int = 0
    dropped_unsupervised: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, others = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + others[name] for name in mine})


def shift(ids: Sequence[int], mask: Sequence[float]) -> Example:
    """ids [T] and the mask [T] of tokens to be learned, as an Example [T].

    The last target repeats the last token and weighs nothing.
    """
    ids, mask = np.asarray(ids, np.int32), np.asarray(mask, np.float32)
    if ids.shape != mask.shape or ids.ndim != 1:
        raise ValueError(f"ids {ids.shape} and mask {mask.shape} must be equal and of one axis")
    targets = np.concatenate([ids[1:], ids[-1:]])
    weights = np.concatenate([mask[1:], np.zeros(min(len(mask), 1), np.float32)])
    return Example(ids, targets, weights)


def prepend(example: Example, ids: Sequence[int]) -> Example:
    """The example after the virtual `ids` [P] of a learned prompt (`weights.prompt.ids`): [P + T].

    They weigh nothing, and their targets are the first token, as a virtual id can be none. The prompt
    counts against a model's context, so `examples` are to be made with a max_length of P less.
    """
    if not len(example.tokens):
        raise ValueError("an empty example cannot follow a prompt")
    return Example(
        np.concatenate([np.asarray(ids, np.int32), example.tokens]),
        np.concatenate([np.repeat(example.tokens[:1], len(ids)), example.targets]),
        np.concatenate([np.zeros(len(ids), np.float32), example.weights]),
    )


def examples(
    conversations: Iterable[tuple[str, list[dict[str, Any]]]],
    encode: Encode,
    max_length: int,
    truncate: Truncate = "right",
) -> tuple[list[Example], Counts]:
    """Examples of at most `max_length` tokens from (place, messages), and what became of each.

    `encode` gives (ids, mask) of messages, `partial(chat.encode_chat, tokenizer)` say. A longer
    conversation loses its end ("right") or its beginning ("left"), is left out ("drop"), or is a
    ValueError that names its place ("error"). One without a supervised token, before or after
    truncation, is left out. Both are counted. ValueError when nothing remains, and naming the place
    when `encode` raises one.
    """
    if truncate not in ("right", "left", "drop", "error"):
        raise ValueError(f"truncate {truncate!r}; expected 'right', 'left', 'drop' or 'error'")
    if max_length < 2:
        raise ValueError(f"max_length {max_length}; an example needs 2 tokens or more")
    kept, counts = [], Counts()
    for place, messages in conversations:
        try:
            ids, mask = encode(messages)
        except ValueError as error:  # a chat template that refuses the conversation, say
            raise ValueError(f"{place}: {error}") from error
        example, count = _example(ids, mask, place, max_length, truncate)
        counts += count
        if example is not None:
            kept.append(example)
    if not kept:
        raise ValueError(f"no example has a supervised token: {counts}")
    return kept, counts


def _example(
    ids: np.ndarray, mask: np.ndarray, place: str, max_length: int, truncate: Truncate
) -> tuple[Example | None, Counts]:
    long = len(ids) > max_length
    if long and truncate == "error":
        raise ValueError(f"{place}: {len(ids)} tokens, more than max_length {max_length}")
    if long and truncate == "drop":
        return None, Counts(read=1, dropped_long=1)
    if long:
        part = slice(None, max_length) if truncate == "right" else slice(-max_length, None)
        ids, mask = ids[part], mask[part]
    example = shift(ids, mask)
    supervised = int(np.count_nonzero(example.weights))
    if supervised == 0:
        return None, Counts(read=1, dropped_unsupervised=1)
    return example, Counts(
        read=1, kept=1, truncated=int(long), tokens=len(ids), supervised_tokens=supervised
    )
