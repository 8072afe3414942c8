"""Ragged prompts as one rectangle: shape buckets, left padding, checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from research.types import Params
from research.weights.base import row_count


class PromptError(ValueError):
    """A prompt is empty, holds an id outside the vocabulary, or does not fit the context."""


def bucket(length: int, least: int = 16, steps: int = 4) -> int:
    """The next of the sizes 16, 20, 24, 28, 32, 40, ...: `steps` an octave, from `least` on.

    Few sizes mean few compilations; four steps waste at most a quarter, two at most a half.
    """
    step = max(1, least // steps)
    while step * 2 * steps < length:
        step *= 2
    return max(least, -(-length // step) * step)


def left_padded(
    prompts: Sequence[Sequence[int]], width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [B, width] int32; padding, on the left, has segment id 0."""
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    segments = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    return tokens, segments


def readable(params: Params) -> int:
    """How many ids a model's embedding has rows for: the vocabulary's, and then those of a prompt
    that was learned (`weights.prompt`)."""
    return row_count(params["embed"]["table"])


def check_prompts(
    prompts: Sequence[Sequence[int]],
    ids: int,
    context: int,
    max_tokens: int,
    missing: Callable[[Sequence[int]], str | None] = lambda prompt: None,
    before: int = 0,
) -> None:
    """PromptError naming the first prompt that cannot be continued by `max_tokens` tokens.

    ids: how many there are, see `readable`. missing: what a position scheme says that a prompt
    lacks, see `NoPosition.missing`. before: slots of the context that a model's rows begin with.
    """
    if not len(prompts):
        raise PromptError("no prompts: expected a list of lists of token ids")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise PromptError(f"prompt {row} is empty: it needs at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= ids:
            outside = low if low < 0 else high
            raise PromptError(f"prompt {row} holds token id {outside}; ids are 0..{ids - 1}")
        if before + len(prompt) + max_tokens > context:
            raise PromptError(
                f"{preceded(before)}prompt {row} has {len(prompt)} tokens and max_tokens is {max_tokens}: "
                f"together more than the context of {context}"
            )
        if (lack := missing(prompt)) is not None:
            raise PromptError(f"prompt {row} {lack}")


def preceded(before: int) -> str:
    """How an error about the context begins when a model's rows do not begin with the prompt."""
    return f"after a prefix of {before}, " if before else ""
