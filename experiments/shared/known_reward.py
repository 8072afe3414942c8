"""A small policy with habits, and a reward that is known: where methods of alignment can be compared exactly.

The policy is a decoder of two layers that has learned sequences of digits from a random Markov chain. The
reward is the mean of what the digits of an answer are worth, a digit from −1 to 1, all answers of one length:
no answer can be exploited, and the best one is known. What matters is how much reward a method gets for
how many nats from where it began.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.shared import text_policy
from research.data import packing, source
from research.data.preferences import ExamplePair
from research.data.supervised import shift
from research.decode.sampling import Sampling
from research.objectives import next_token
from research.rl.online import example, pair_table
from research.rl.play import play, scored
from research.rl.policy import scorer, without_critic
from research.rl.record import WHOLE, lay_out
from research.rl.tasks import ASK, DIGIT, Task, Transcript
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.types import Params

DIGITS, LENGTH = 10, 8
SIZE = DIGIT + DIGITS


def worth() -> np.ndarray:
    """[DIGITS] from −1 to 1, in a mixed order."""
    return np.random.default_rng(7).permutation(np.linspace(-1, 1, DIGITS))


def task() -> Task:
    def prompts(rng: np.random.Generator, count: int) -> list[list[int]]:
        return [[ASK, DIGIT + int(d)] for d in rng.integers(0, DIGITS, count)]

    def score(found: list[Transcript]) -> np.ndarray:
        value = np.concatenate([np.full(DIGIT, -1.0), worth()])
        return np.array([value[t.ids].mean() for t in found], np.float32)

    return Task(SIZE, prompts, score, 1.0, length=LENGTH + 1, max_tokens=LENGTH, stop_ids=())


@cache
def chain() -> np.ndarray:
    """[DIGITS, DIGITS]: what comes after what."""
    return np.random.default_rng(3).dirichlet(np.full(DIGITS, 0.5), DIGITS)


@cache
def reference(steps: int = 300) -> Params:
    """The policy before any preference: it has learned the chain."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(512):
        digits = [int(rng.integers(DIGITS))]
        for _ in range(LENGTH):
            digits.append(int(rng.choice(DIGITS, p=chain()[digits[-1]])))
        rows.append(shift([ASK, *(DIGIT + d for d in digits)], [0.0, 0.0, *[1.0] * LENGTH]))
    model = text_policy.model(SIZE)
    params = text_policy.start(model, 0, critic=False)
    table = packing.pad(rows, LENGTH + 2)
    batches = source.supervised_source(table, 64, 0)
    done = fit(next_token(model), batches, params, AdamW(3e-3), Training(steps, log_every=None))
    return done.params


def sampled(params: Params, count: int, seed: int) -> tuple[list[Transcript], np.ndarray]:
    """Answers to `count` prompts at temperature 1, and their rewards."""
    asked = task().prompts(np.random.default_rng(seed), count)
    sampling = Sampling(max_tokens=LENGTH)
    found, _ = play(
        text_policy.model(SIZE),
        without_critic(params),
        task(),
        asked,
        sampling,
        jax.random.key(seed),
    )
    return found, scored(task(), found)


def measured(params: Params, count: int = 512, seed: int = 10_000) -> dict[str, float]:
    """{reward, kl}: means over answers of the policy, the KL from the reference in nats an answer."""
    found, rewards = sampled(params, count, seed)
    rows = [([*t.prompt, *t.ids], [0] * len(t.prompt) + t.chosen) for t in found]
    laid = lay_out(rows, task().length, [[0.0] * LENGTH] * count)
    batch = {name: laid[name] for name in (*WHOLE, "mask")} | {"temperature": np.float32(1)}
    score = scorer(text_policy.model(SIZE))
    ours, theirs = (score(p, batch).log_probs for p in (without_critic(params), reference()))
    return {"reward": float(rewards.mean()), "kl": float((ours - theirs).sum(1).mean())}


def offline_pairs(count: int, seed: int) -> packing.Table:
    """`count` pairs of the reference's answers; which is the better one is drawn as Bradley and Terry have it
    with rewards times 8."""
    asked = task().prompts(np.random.default_rng(seed), count)
    twice = [p for p in asked for _ in (0, 1)]
    sampling, rng = Sampling(max_tokens=LENGTH), jax.random.key(seed)
    found, _ = play(text_policy.model(SIZE), reference(), task(), twice, sampling, rng)
    rewards = scored(task(), found).reshape(-1, 2)
    gap = 8 * (rewards[:, 0] - rewards[:, 1])
    luck = np.random.default_rng(seed + 1).random(count)
    first = luck < 1 / (1 + np.exp(-gap))
    pairs = []
    for i, is_first in enumerate(first):
        both = (found[2 * i], found[2 * i + 1]) if is_first else (found[2 * i + 1], found[2 * i])
        pairs.append(ExamplePair(*map(example, both)))
    return pair_table(pairs, 2 * (task().length + 1))


def trained(
    objective,
    batches,
    lr: float,
    steps: int,
    seed: int,
    directory: Path | None,
    config: Any,
    critic=False,
):
    """The parameters after `steps` from the reference, which is the context's too."""
    params = reference()
    start = text_policy.with_critic(params, text_policy.WIDTH) if critic else params
    return fit(
        objective,
        batches,
        start,
        AdamW(lr, weight_decay=0.0),
        Training(steps, log_every=max(1, steps // 20), seed=seed, directory=directory),
        context={"reference": params},
        identity=config,
    ).params
