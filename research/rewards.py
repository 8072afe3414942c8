"""How good answers are, as one kind of function: rules, learned models, and what is made of several.

    reward = checked(weighted([learned(model, params, encode), length(200)], [1.0, 0.1]))
    reward(prompts, answers)          # [B] float32, greater is better

A rule needs no model and can be read. A learned reward is a network's opinion: `ensemble` and
`normalised` make it harder to exploit (Coste et al. 2023, arXiv:2310.02743) and give it a known scale.
Nothing here is traced; a learned reward calls a compiled function of few shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from research.decode.prompts import bucket
from research.evaluate import diversity, generation
from research.models.heads import Head
from research.objectives import head_outputs
from research.types import Array, Batch, Params

# (prompts [B], answers [B]) -> scores [B] float32
Reward = Callable[[Sequence[str], Sequence[str]], np.ndarray]
How = Literal["mean", "min", "uncertainty-penalised"]
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")


def each(score: Callable[[str, str], float]) -> Reward:
    """The reward that `score(prompt, answer)` gives each answer by itself."""

    def reward(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        found = [score(p, a) for p, a in zip(prompts, answers, strict=True)]
        return np.asarray(found, np.float32)

    return reward


def length(target: float, size: Callable[[str], int] = len) -> Reward:
    """−|size − target| / target: 0 at the target, −1 for an empty answer. `size` counts characters, or
    tokens: `lambda text: len(tokenizer.encode(text))`."""
    if not target > 0:
        raise ValueError(f"the length to aim at must be above 0, not {target}")
    return each(lambda prompt, answer: -abs(size(answer) - target) / target)


def matches(pattern: str) -> Reward:
    """1 where the whole answer, less white space at its ends, matches; `.` matches line ends too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return each(lambda prompt, answer: float(compiled.fullmatch(answer.strip()) is not None))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, commas between its digits left out; None where there is none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def correct(
    truths: Mapping[str, str], read: Callable[[str], Any] = generation.normalised
) -> Reward:
    """1 where `read` finds in the answer what it finds in the truth of its prompt, else 0; what it finds
    nothing in (None) is wrong. `read` is the text without case and punctuation, or `last_number`.

    ValueError for a truth in which it finds nothing; KeyError for a prompt without a truth.
    """
    known = {prompt: read(truth) for prompt, truth in truths.items()}
    for prompt, truth in known.items():
        if truth is None or truth == "":
            raise ValueError(f"no answer can be read from {truths[prompt]!r}, of {_brief(prompt)}")

    def score(prompt: str, answer: str) -> float:
        if prompt not in known:
            raise KeyError(f"no true answer is known for the prompt {_brief(prompt)}")
        return float(read(answer) == known[prompt])

    return each(score)


def distinct_words(split: Callable[[str], Sequence[str]] = generation.words) -> Reward:
    """Different words over all words of an answer, in [0, 1]; 0 for one without words."""

    def score(prompt: str, answer: str) -> float:
        found = split(answer)
        return len(set(found)) / len(found) if found else 0.0

    return each(score)


def repetition(n: int = 3, split: Callable[[str], Sequence[str]] = generation.words) -> Reward:
    """−(1 − different / all n-grams of words), in (−1, 0]; 0 for an answer that is shorter (Welleck et al.
    2019, arXiv:1908.04319)."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")

    def score(prompt: str, answer: str) -> float:
        found = split(answer)
        return -diversity.repetition([found], n) if len(found) >= n else 0.0

    return each(score)


def learned(
    model: Any,
    params: Params,
    encode: Callable[[str, str], Sequence[int]],
    head: Head = Head(1),
    max_length: int = 512,
    rows: int = 8,
) -> Reward:
    """What a reward model's head says of `encode(prompt, answer)`, tokens of which those after
    `max_length` are cut off.

    Texts of like length share a batch of `rows`, padded to a bucket, so that few shapes are compiled.
    ValueError for a head of more outputs than one, and for a text without tokens.
    """
    if head.outputs != 1 or rows < 1 or not 1 <= max_length <= model.config.max_length:
        raise ValueError(
            f"a reward needs 1 output, rows of at least 1, and a max_length in 1..{model.config.max_length}; "
            f"got {head.outputs}, {rows} and {max_length}"
        )

    def reward(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        texts = [list(encode(p, a))[:max_length] for p, a in zip(prompts, answers, strict=True)]
        if empty := [i for i, ids in enumerate(texts) if not ids]:
            raise ValueError(f"answer {empty[0]} and its prompt have no tokens")
        scores = np.zeros(len(texts), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            batch = _right_padded([texts[i] for i in chosen], rows)
            scores[chosen] = jax.device_get(_scored(model, head, params, batch))[: len(chosen)]
        return scores

    return reward


@partial(jax.jit, static_argnums=(0, 1))
def _scored(model: Any, head: Head, params: Params, batch: Batch) -> Array:
    return head_outputs(model, head, params, batch)[:, 0]


def _right_padded(texts: Sequence[Sequence[int]], rows: int) -> Batch:
    shape = (rows, bucket(max(map(len, texts))))
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids")}
    for row, ids in enumerate(texts):
        batch["tokens"][row, : len(ids)] = ids
        batch["segment_ids"][row, : len(ids)] = 1
    return batch


def weighted(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """Σ weight · reward, of as many weights as rewards."""
    if not rewards or len(rewards) != len(weights):
        raise ValueError(f"{len(rewards)} rewards but {len(weights)} weights")
    return lambda p, a: np.float32(weights) @ _stacked(rewards, p, a)


def ensemble(rewards: Sequence[Reward], how: How = "mean", penalty: float = 1.0) -> Reward:
    """One reward of several: their mean, the least of them, or mean − penalty · variance between them
    (Coste et al. 2023, eq. 3 and 4). Rewards should have one scale: see `normalised`."""
    if not rewards:
        raise ValueError("an ensemble needs at least one reward")
    ways = {
        "mean": lambda x: x.mean(0),
        "min": lambda x: x.min(0),
        "uncertainty-penalised": lambda x: x.mean(0) - penalty * x.var(0),
    }
    if how not in ways:
        raise ValueError(f"how {how!r}; expected one of {list(ways)}")
    return lambda p, a: ways[how](_stacked(rewards, p, a))


def normalised(reward: Reward, mean: float, std: float) -> Reward:
    """(reward − mean) / std, with the mean and deviation of some answers that are to lie about 0."""
    if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
        raise ValueError(f"mean must be finite and std above 0, got {mean} and {std}")
    return lambda prompts, answers: ((reward(prompts, answers) - mean) / std).astype(np.float32)


def checked(reward: Reward) -> Reward:
    """The reward, or a ValueError: which answer's score is nan or infinite, or that there is not one
    score an answer, and one answer a prompt."""

    def safe(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers")
        scores = np.asarray(reward(prompts, answers))
        if scores.shape != (len(answers),) or scores.dtype.kind not in "fiub":
            raise ValueError(
                f"a reward gave {scores.dtype} {scores.shape}; expected numbers ({len(answers)},), one an answer"
            )
        if not np.isfinite(scores).all():
            wrong = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(
                f"the reward of answer {wrong}, {_brief(answers[wrong])}, is {scores[wrong]}"
            )
        return scores.astype(np.float32)

    return safe


def _stacked(
    rewards: Sequence[Reward], prompts: Sequence[str], answers: Sequence[str]
) -> np.ndarray:
    return np.stack([np.asarray(reward(prompts, answers), np.float32) for reward in rewards])


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
