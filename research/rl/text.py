"""Real text as a Task: prompts of a chat model, and any reward of texts.

task = text_task(model.config.vocab_size, prompts, tokenizer.decode, reward, max_tokens, tokenizer.stop_ids)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from research.rewards import Reward, checked
from research.rl.tasks import Task, Transcript


def text_task(
    size: int,
    prompts: Sequence[tuple[str, list[int]]],
    decode: Callable[[Sequence[int]], str],
    reward: Reward,
    max_tokens: int,
    stop_ids: Sequence[int],
    in_order: bool = False,
) -> Task:
    """Answers to `prompts`, (what the reward is told was asked, the ids that the policy reads).

    Each iteration draws prompts without putting any back; `in_order` they come as they stand, for an
    evaluation. ValueError for two prompts of the same ids that were asked differently, and when more
    are drawn than there are.
    """
    if not prompts:
        raise ValueError("there are no prompts")
    asked = {}
    for text, ids in prompts:
        if asked.setdefault(tuple(ids), text) != text:
            raise ValueError(f"two prompts have the same ids: {text[:60]!r}")
    safe, longest = checked(reward), max(len(ids) for _, ids in prompts)

    def draw(rng: np.random.Generator, count: int) -> list[list[int]]:
        if count > len(prompts):
            raise ValueError(f"{count} prompts are asked for and there are {len(prompts)}")
        order = np.arange(count) if in_order else rng.permutation(len(prompts))[:count]
        return [list(prompts[i][1]) for i in order]

    def score(transcripts: Sequence[Transcript]) -> np.ndarray:
        texts = [decode(_said(t, stop_ids)) for t in transcripts]
        return safe([asked[tuple(t.prompt)] for t in transcripts], texts)

    return Task(
        size=size,
        prompts=draw,
        score=score,
        best=float("inf"),
        length=longest + max_tokens - 1,
        max_tokens=max_tokens,
        stop_ids=tuple(stop_ids),
    )


def _said(t: Transcript, stop_ids: Sequence[int]) -> list[int]:
    return t.ids[:-1] if t.ids and t.ids[-1] in stop_ids else t.ids
