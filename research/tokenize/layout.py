"""A chat format as data: which control tokens and which texts a conversation becomes.

A layout is a list of control tokens and of runs of text. A run is encoded in one call, as the
model's authors encoded it, since neighbours merge; each part of it says how much its tokens weigh
in the loss, 0 for what is given and 1 for what the model learns to say. Control tokens are put in
as ids and never come from text (control.py). formats.py has the formats of published models.

    ids, mask = encode(tokenizer, formats.LLAMA3, messages)

Messages are those of chat.py. When the last is not the assistant's, the layout ends where the
answer begins: that is the prompt to generate from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from research.tokenize.chat import Message
from research.tokenize.control import encode_literally
from research.tokenize.tokenizer import Tokenizer, TokenizerError


class FormatError(ValueError):
    """A conversation that a chat format cannot write."""


class Control(NamedTuple):
    """A control token: its name, or its id where the vocabulary gives it no name of its own, or
    "bos" or "eos" for the tokenizer's. With `needed` False it is left out if there is none."""

    token: str | int
    weight: float = 0.0
    needed: bool = True


class Part(NamedTuple):
    """Text of a run, and how much its tokens weigh in the loss."""

    text: str
    weight: float = 0.0


Layout = list[Control | list[Part]]


@dataclass(frozen=True)
class Format:
    """`layout` writes a conversation; `control` are all its control tokens ("bos" only where the
    tokenizer has one), `stop` those that end an answer when the model says them."""

    layout: Callable[[list[Message]], Layout]
    control: tuple[str | int, ...]
    stop: tuple[str | int, ...]


class Round(NamedTuple):
    """What a user said and the answer, None when it is to be generated."""

    user: str
    answer: str | None
    weight: float


def encode(
    tokenizer: Tokenizer, format: Format, messages: Sequence[Message]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T] int32, mask [T] float32) of a conversation, or of the prompt of its next answer.

    The mask is the weight of the message (1, or its `loss_weight`) on the tokens of an answer and
    on the control token that ends it, 0 elsewhere. A token that begins in the prompt and ends in
    the answer is not part of the answer. FormatError when the format has no place for a message,
    TokenizerError when the vocabulary lacks a control token.
    """
    ids, mask = [], []
    control = {token_id(tokenizer, name) for name in format.control if _there(tokenizer, name)}
    for chunk in format.layout(list(messages)):
        if isinstance(chunk, Control):
            if chunk.needed or _there(tokenizer, chunk.token):
                ids.append(token_id(tokenizer, chunk.token))
                mask.append(chunk.weight)
            continue
        found, offsets = encode_literally(tokenizer, "".join(p.text for p in chunk), control)
        starts = list(accumulate((len(part.text) for part in chunk[:-1]), initial=0))
        ids += found
        mask += [chunk[bisect_right(starts, start) - 1].weight for start, _ in offsets]
    return np.asarray(ids, np.int32), np.asarray(mask, np.float32)


def _there(tokenizer: Tokenizer, token: str | int) -> bool:
    return token != "bos" or tokenizer.bos_id is not None


def token_id(tokenizer: Tokenizer, token: str | int) -> int:
    """The id of a control token; TokenizerError when the tokenizer has none."""
    if token in ("bos", "eos"):
        found = getattr(tokenizer, f"{token}_id")
        if found is None:
            raise TokenizerError(f"the tokenizer has no {token} token")
        return found
    if isinstance(token, str):
        return tokenizer.id_of(token)
    if tokenizer.id_to_token(token) is None:
        raise TokenizerError(
            f"token id {token} is outside the vocabulary of {tokenizer.vocab_size} tokens"
        )
    return token


def stop_ids(tokenizer: Tokenizer, format: Format) -> tuple[int, ...]:
    """The ids that end an answer."""
    return tuple(token_id(tokenizer, token) for token in format.stop)


def last_rounds(
    tokenizer: Tokenizer, format: Format, messages: Sequence[Message], most: int
) -> list[Message]:
    """The messages without the oldest rounds, as few left out as make at most `most` tokens.

    A round is a user's message and what follows it until the next; the system message stays.
    FormatError when the last round alone is too long.
    """
    messages = list(messages)
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start in starts:
        kept = messages[: starts[0]] + messages[start:]
        length = len(encode(tokenizer, format, kept)[0])
        if length <= most:
            return kept
    if not starts:
        raise FormatError("the conversation has no user message")
    raise FormatError(f"the last round alone has {length} tokens; at most {most} are allowed")


def rounds(messages: list[Message], system: bool = True) -> tuple[str | None, list[Round]]:
    """(system text or None, rounds) of user and assistant taking turns.

    FormatError naming the message that is out of turn, or a system message where `system` is False.
    """
    if system and messages and messages[0]["role"] == "system":
        _, found = rounds(messages[1:], system=False)
        return messages[0]["content"], found
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise FormatError(
                f"message {index} after the system message is {message['role']!r}; this format has "
                f"{expected!r} there"
            )
    if not messages:
        raise FormatError("the conversation has no user message")
    pairs = zip(messages[::2], [*messages[1::2], None], strict=False)
    return None, [
        Round(
            user["content"],
            *((None, 0.0) if answer is None else (answer["content"], _weight(answer))),
        )
        for user, answer in pairs
    ]


def turns(messages: list[Message], roles: Sequence[str]) -> list[tuple[str, str, float]]:
    """[(role, content, weight)] of messages in any order; FormatError when a role is not of `roles`."""
    for index, message in enumerate(messages):
        if message["role"] not in roles:
            raise FormatError(
                f"message {index} is {message['role']!r}; this format has {', '.join(roles)}"
            )
    if not messages:
        raise FormatError("the conversation is empty")
    return [
        (m["role"], m["content"], _weight(m) if m["role"] == "assistant" else 0.0) for m in messages
    ]


def _weight(message: Message) -> float:
    return message.get("loss_weight", 1.0)
