"""A small decoder on a task, for the tests of reinforcement learning."""

import jax

from research.models import decoder
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.objectives.reference import in_context
from research.rl import tasks
from research.rl.advantage import Estimator
from research.rl.policy import with_critic
from research.rl.source import Rollouts, rollout_source

TASK = tasks.copy(2, 3)
MODEL = Decoder(llama(TASK.size, 2, 16, 2, 2, 24, tied=False))
SETTINGS = Rollouts(
    prompts=4,
    answers=2,
    epochs=2,
    minibatches=2,
    temperature=0.7,
    estimator=Estimator("gae"),
    kl=0.1,
)


def start(seed=0, critic=True):
    params = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(seed))
    return with_critic(params, 16) if critic else params


def source(settings=SETTINGS, task=TASK, **more):
    return rollout_source(MODEL, task, settings, in_context(), **more)


def first(settings=SETTINGS, params=None, seed=3, task=TASK, **more):
    """(params, context, the first batch, the source's state after it)."""
    params = start() if params is None else params
    context = {"reference": start(1, critic=False)}
    made = source(settings, task, **more)
    rng = jax.random.key(seed)
    batch, state = made.next(made.init(rng), params, context, rng, {})
    return params, context, batch, state
