"""Answers by the jitted sampler, from prompts to transcripts; and what the time went to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from research.decode.generate import generate
from research.decode.prompts import bucket
from research.decode.sampling import Sampling
from research.rl.policy import without_critic
from research.rl.tasks import Task, Transcript, visible
from research.types import Array, Params

FIRST = "generate"  # the phase that an iteration begins with


class Clock:
    """Seconds by phase, and of what is between two iterations of phases: the training steps, 'update'. The
    steps after the last iteration are not counted."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._left: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        if self._left is not None and phase == FIRST:
            self._add("update", start - self._left)
        self._left = None
        try:
            yield
        finally:
            self._left = time.perf_counter()
            self._add(phase, self._left - start)

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """{phase: share of all the time}."""
        total = sum(self.seconds.values()) or 1.0
        return {phase: spent / total for phase, spent in self.seconds.items()}


def play(
    model: Any,
    params: Params,
    task: Task,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    rng: Array,
    pad_id: int = 0,
) -> tuple[list[Transcript], list[list[float]]]:
    """What the policy makes of the prompts, and what the sampler said of each token it drew, without
    temperature.

    Turn for turn all rows are drawn, those that are over too: one shape, one compilation a turn.
    """
    policy, done = without_critic(params), [False] * len(prompts)
    found = [Transcript(list(p), [], [], False) for p in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    for turn in range(task.turns):
        rows = [[*visible(t.prompt), *t.ids] for t in found]
        said = generate(
            model,
            policy,
            rows,
            jax.random.fold_in(rng, turn),
            sampling,
            pad_id,
            width=bucket(task.length + 1 - sampling.max_tokens),
        )
        for i, ids in enumerate(said.rows()):
            if not done[i]:
                found[i] = _after(found[i], ids, task)
                log_probs[i] += said.log_probs[i, : len(ids)].tolist()
        for i, t in enumerate(found):
            if task.reply is not None and not done[i]:
                found[i] = _answered(t, task.reply(t), turn + 1 == task.turns)
                done[i] = found[i].ended
    return found, log_probs


def _after(t: Transcript, ids: list[int], task: Task) -> Transcript:
    chosen = [*t.chosen, *[1] * len(ids)]
    ended = bool(ids) and ids[-1] in task.stop_ids
    return Transcript(t.prompt, [*t.ids, *ids], chosen, ended)


def _answered(t: Transcript, reply: list[int] | None, last: bool) -> Transcript:
    """With what the environment says; nobody hears what it says after the last turn."""
    if reply is None:
        return t._replace(ended=True)
    more = [] if last else reply
    return t._replace(ids=[*t.ids, *more], chosen=[*t.chosen, *[0] * len(more)])


def scored(task: Task, transcripts: Sequence[Transcript]) -> np.ndarray:
    """The task's scores [B] float32; ValueError for another shape, nan or infinity."""
    scores = np.asarray(task.score(transcripts), np.float32)
    if scores.shape != (len(transcripts),):
        raise ValueError(
            f"the reward gave an array {scores.shape}; expected ({len(transcripts)},), one an answer"
        )
    if not np.isfinite(scores).all():
        wrong = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"the reward of answer {wrong}, {transcripts[wrong]}, is {scores[wrong]}")
    return scores
