"""A decoder of two layers that learns a text environment from nothing, and what its answers score."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np

from research.decode.sampling import Sampling
from research.models import decoder
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.rl.play import play, scored
from research.rl.policy import with_critic
from research.rl.tasks import Task
from research.types import Params

WIDTH = 64


@cache
def model(size: int, init_std: float = 0.02) -> Decoder:
    """For a task's vocabulary."""
    return Decoder(llama(size, 2, WIDTH, 4, 4, 2 * WIDTH, tied=False, init_std=init_std))


def start(policy: Decoder, seed: int, critic: bool = True) -> Params:
    """Drawn at random; the critic says 0 everywhere."""
    params = jax.jit(decoder.init, static_argnums=0)(policy, jax.random.key(seed))
    return with_critic(params, WIDTH) if critic else params


def score(
    policy: Decoder, params: Params, task: Task, count: int, temperature: float = 1.0
) -> float:
    """Mean over `count` answers, drawn as in training, or the likeliest at temperature 0."""
    sampling = Sampling(temperature=temperature, max_tokens=task.max_tokens, stop_ids=task.stop_ids)
    prompts = task.prompts(np.random.default_rng(0), count)
    found, _ = play(policy, params, task, prompts, sampling, jax.random.key(0))
    return float(scored(task, found).mean())
