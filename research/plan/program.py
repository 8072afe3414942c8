"""What a training step costs, from its compiled program: memory, arithmetic, optimizer state.

    Job(model, params, rule, objective_of, optimizer, batch).costs()

Nothing is trained and no array is made: shapes are all that is needed. A step's two halves can be had
alone: the loss with its gradients, and the update that follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.kernels.attend import reference
from research.models.decoder import unstack
from research.train.optim import Finished, Optimizer
from research.train.optim import optimizer as make_optimizer
from research.train.partition import Rule, partition
from research.train.state import TrainState, initial_state, training_rng
from research.train.step import accumulated_gradients, make_step, split_batch
from research.types import Batch, Objective, Params, PyTree

# Memory and arithmetic are settled before code is generated, which is most of the time.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def beginning(
    optimizer: Optimizer | Finished, params: Params, rule: Rule
) -> tuple[TrainState, Params]:
    """(the state before the first step, frozen leaves), as `train.loop.fit` makes them."""
    trainable, frozen = partition(params, rule)
    return initial_state(trainable, make_optimizer(optimizer, trainable), training_rng(0)), frozen


def lowered(
    objective: Objective, optimizer: Optimizer | Finished, params: Params, rule: Rule, batch: Batch
) -> Any:
    """The step as a program for these shapes, not yet compiled; the state is donated."""
    state, frozen = jax.eval_shape(lambda p: beginning(optimizer, p, rule), params)
    step = make_step(objective, make_optimizer(optimizer, state.trainable))
    shapes = jax.eval_shape(lambda: batch)
    return jax.jit(step, donate_argnums=0).lower(state, frozen, None, shapes)


def gradients_lowered(objective: Objective, params: Params, rule: Rule, batch: Batch) -> Any:
    """The loss and its gradients alone, which are results: no temporary is one of them."""

    def run(trainable: Params, frozen: Params, batch: Batch):
        state = TrainState(jnp.int32(0), trainable, None, None, training_rng(0))
        return accumulated_gradients(objective, state, frozen, None, split_batch(batch, 1), 1)

    trainable, frozen = partition(jax.eval_shape(lambda: params), rule)
    return jax.jit(run).lower(trainable, frozen, jax.eval_shape(lambda: batch))


def update_lowered(optimizer: Optimizer | Finished, params: Params, rule: Rule) -> Any:
    """The step without the model: of half the sum of squares, whose gradient is the parameters
    themselves and needs no memory."""

    def half(params: Params, context: Any, batch: Batch, rng: Any):
        trainable, _ = partition(params, rule)
        squares = [
            jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(trainable)
        ]
        return sum(squares) / 2, {}

    return lowered(half, optimizer, params, rule, {})


def memory_of(program: Any) -> dict[str, int]:
    """Bytes of a compiled step's temporaries and of its arguments (parameters, state, batch).

    Results lie in the donated state's place and need nothing more.
    """
    found = program.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    return {
        "temporary_bytes": temporaries,
        "argument_bytes": arguments,
        "peak_bytes": arguments + temporaries,
    }


def unscanned(model: Any) -> Any:
    """The model with its layers one after another, nothing computed twice, and attention that XLA can count."""
    config = dataclasses.replace(model.config, scan=False, remat=None, attend=reference)
    return model.clone(config=config)


def state_bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Job:
    """What a training step does: `objective_of(model)` for the leaves that `rule` matches."""

    model: Any
    params: Params
    rule: Rule
    objective_of: Callable[[Any], Objective]
    optimizer: Optimizer | Finished
    batch: Batch

    def lowered(self, model: Any, params: Params) -> Any:
        return lowered(self.objective_of(model), self.optimizer, params, self.rule, self.batch)

    def memory(self) -> dict[str, int]:
        """Of the step as it trains."""
        return memory_of(self.lowered(self.model, self.params).compile())

    def flops(self) -> float:
        """Of the same step with a tree for each layer: of a scan's layers only one is counted."""
        apart = jax.eval_shape(unstack, self.params)
        return self.lowered(unscanned(self.model), apart).cost_analysis()["flops"]

    def optimizer_bytes(self) -> int:
        """What the optimizer keeps from one step to the next."""
        trainable, _ = partition(jax.eval_shape(lambda: self.params), self.rule)
        return state_bytes(
            jax.eval_shape(make_optimizer(self.optimizer, trainable).init, trainable)
        )

    def costs(self) -> dict[str, float]:
        kept = {"optimizer_bytes": self.optimizer_bytes()}
        return self.memory() | {"flops": self.flops()} | kept
