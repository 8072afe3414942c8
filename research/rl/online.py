"""Pairs of the policy's own answers, judged as they come: iterative and online DPO.

Offline preference data say what another model's answers are worth. Here the policy answers each prompt several
times, a judge (a rule or a reward model: the task's score) takes the best and the worst, and any loss of pairs
(`losses.preference`) learns from them, with a live reference (`objectives.reference`): Xu et al. 2023
(arXiv:2312.16682), Guo et al. 2024 (arXiv:2402.04792). New answers come every `refresh` steps; a `refresh` as
long as the run is offline learning from the first policy's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from research.data import shuffle
from research.data.packing import Table
from research.data.preferences import ExamplePair, pair_rows
from research.data.supervised import Example, shift
from research.decode.sampling import Sampling
from research.rl.play import play, scored
from research.rl.source import prompts_of
from research.rl.tasks import Task, Transcript, visible
from research.types import Batch, Source

PAIR_FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")


@dataclass(frozen=True)
class Judged:
    """`answers` to each of `prompts` prompts give a pair; `minibatch` pairs a step, `refresh` steps until the
    policy answers anew. `temperature` above 1 explores, and so does `bonus`: it is added to a score for every
    nat by which the answer was unlikely, so that of two that are judged alike the rarer one is preferred.
    """

    prompts: int = 32
    answers: int = 2
    minibatch: int = 32
    refresh: int = 4
    temperature: float = 1.0
    bonus: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.answers < 2:
            raise ValueError(f"a pair needs 2 answers to a prompt or more, not {self.answers}")
        for name in ("minibatch", "refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.prompts % self.minibatch:
            raise ValueError(
                f"{self.prompts} pairs do not split into minibatches of {self.minibatch}"
            )


def judged_source(model: Any, task: Task, settings: Judged) -> Source:
    """Batches for `objectives.preference`. Pairs that the judge finds equal weigh nothing; where all of
    them are equal the step learns nothing. State: the step, the rows and their weights."""
    sampling = Sampling(
        temperature=settings.temperature, max_tokens=task.max_tokens, stop_ids=task.stop_ids
    )
    length = 2 * (task.length + 1)

    def init(rng) -> dict[str, Any]:
        shape, kinds = (settings.prompts, length), dict.fromkeys(PAIR_FIELDS, np.int32)
        kinds["weights"] = np.float32
        rows = {name: np.zeros(shape, kind) for name, kind in kinds.items()}
        zeros = np.zeros(settings.prompts, np.float32)
        return {"step": np.zeros((), np.int32), "rows": rows, "differ": zeros, "score": zeros}

    def next(state, params, context, rng, last_metrics):
        step = int(state["step"])
        if step % settings.refresh == 0:
            asked = prompts_of(task, settings.seed, step, settings.prompts)
            rows, differ, score = _answered(model, params, task, settings, sampling, asked, rng)
            state = state | {"rows": rows, "differ": differ, "score": score}
        batch = _minibatch(settings, state, step)
        return batch, state | {"step": np.asarray(step + 1, np.int32)}

    return Source(init, next)


def _answered(model, params, task, settings, sampling, asked, rng):
    """(rows of pairs, 1 where the judge sees a difference [P], mean score of a prompt's answers [P])."""
    repeated = [prompt for prompt in asked for _ in range(settings.answers)]
    found, log_probs = play(model, params, task, repeated, sampling, rng)
    scores = scored(task, found)
    rarity = np.array([-sum(each) for each in log_probs], np.float32)
    judged = (scores + settings.bonus * rarity).reshape(-1, settings.answers)
    best, worst = judged.argmax(1), judged.argmin(1)
    first = np.arange(len(asked)) * settings.answers
    pairs = [
        ExamplePair(*(example(found[i]) for i in both))
        for both in zip(first + best, first + worst, strict=True)
    ]
    differ = (judged.max(1) > judged.min(1)).astype(np.float32)
    mean = scores.reshape(-1, settings.answers).mean(1)
    return pair_table(pairs, 2 * (task.length + 1)), differ, mean


def pair_table(pairs: Sequence[ExamplePair], length: int) -> Table:
    table = pair_rows(pairs, length)
    return {name: np.asarray(table[name]) for name in PAIR_FIELDS}


def example(t: Transcript) -> Example:
    """The policy's own tokens weigh 1."""
    prompt = visible(t.prompt)
    return shift([*prompt, *t.ids], [*[0.0] * len(prompt), *map(float, t.chosen)])


def _minibatch(settings: Judged, state: dict, step: int) -> Batch:
    """Part of the pairs, in another order each time they have all been seen."""
    parts = settings.prompts // settings.minibatch
    epoch, part = divmod(step % settings.refresh, parts)
    stream = step // settings.refresh * settings.refresh + epoch
    order = shuffle.permutation(settings.seed, stream, settings.prompts)
    items = order[part * settings.minibatch : (part + 1) * settings.minibatch]
    differ = state["differ"][items]
    weights = (differ / max(differ.sum(), 1.0)).astype(np.float32)
    rows = jax.tree.map(lambda x: x[items], state["rows"])
    return rows | {"pair_weights": weights, "rollout/score": np.float32(state["score"].mean())}
