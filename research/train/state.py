"""The state of a training run: everything that changes from step to step, as one pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from research.types import Array, Params, PyTree

# Training draws from a stream of its own: an experiment that folds small numbers into the key of
# the same seed, to initialise or to adapt a model, never meets the key of a micro-batch.
_TRAINING_STREAM = 0x7261_696E
# The Source draws from a stream that no micro-batch uses.
_SOURCE_STREAM = 2**31 - 1


@struct.dataclass
class TrainState:
    """step           int32 [], optimizer steps taken
    trainable      parameters, `None` where frozen
    opt_state      of the optimizer, for the trainable leaves only
    source_state   whatever the Source needs to go on: data position, rollout buffer, ...
    rng            training's key of the seed; it never changes, steps are folded into it
    ema            moving average of `trainable` in float32, or None
    """

    step: Array
    trainable: Params
    opt_state: optax.OptState
    source_state: PyTree
    rng: Array
    ema: Params | None = None


def initial_state(
    trainable: Params,
    optimizer: optax.GradientTransformation,
    rng: Array,
    source_state: Any = None,
    ema: bool = False,
) -> TrainState:
    """The state before the first step. Leaves are copied: the step donates what it is given, and
    the caller's arrays may also be a reference policy or a frozen alias."""
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        trainable=jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trainable),
        opt_state=optimizer.init(trainable),
        source_state=source_state,
        rng=rng,
        ema=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)
        if ema
        else None,
    )


def training_rng(seed: int) -> Array:
    """The key of a run, from which all others are folded."""
    return jax.random.fold_in(jax.random.key(seed), _TRAINING_STREAM)


def micro_rng(rng: Array, step: Array, micro: Array) -> Array:
    """The key of one micro-batch of one step."""
    return jax.random.fold_in(jax.random.fold_in(rng, step), micro)


def source_rng(rng: Array, step: int) -> Array:
    """The key the Source gets when it makes the batch of `step`."""
    return jax.random.fold_in(jax.random.fold_in(rng, step), _SOURCE_STREAM)


def source_init_rng(rng: Array) -> Array:
    """The key the Source gets for its first state; no step's key is the same."""
    return jax.random.fold_in(rng, _SOURCE_STREAM)
