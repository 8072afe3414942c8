"""Bytes on each device in a step: what is kept from step to step, and what comes and goes.

What is kept is divided as `train.sharding` places it on a mesh of data copies and fsdp parts. What comes
and goes is read off programs that were compiled for the rows of one device, by this machine's CPU:

    forward and backward   temporaries, and the gradients as far as they are this device's
    update                 temporaries of the optimizer's part, divided as its state is

One comes after the other, so that a step needs the larger. Three things differ on an accelerator:
a CPU computes bfloat16 in float32, so that the first is an upper estimate; each compiler has a mind of its
own about what it fuses; and attention is counted in the tiles of this machine's kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from research.models.decoder import head_size
from research.paths import named_leaves
from research.plan.depth import in_depth
from research.plan.program import UNOPTIMISED, gradients_lowered, state_bytes, update_lowered
from research.plan.work import Work
from research.train.optim import optimizer
from research.train.partition import partition
from research.train.sharding import follow, shardings
from research.types import Params, PyTree


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `parameters` holds the trained ones too, and `batch` its rows."""

    parameters: int
    trained: int
    gradients: int
    optimizer: int
    temporaries: int
    batch: int

    @property
    def kept(self) -> int:
        """What a step is given."""
        return self.parameters + self.optimizer + self.batch

    @property
    def total(self) -> int:
        return self.kept + self.gradients + self.temporaries


class Placed(NamedTuple):
    """Trees of shapes that know where they live."""

    params: Params
    trainable: Params
    optimizer: PyTree
    notes: list[str]


def mesh_of(data: int, fsdp: int) -> AbstractMesh:
    """A mesh of devices that need not exist."""
    shape, names = (data, fsdp, 1), ("data", "fsdp", "tensor")
    return AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * 3)


def placed(work: Work, mesh: AbstractMesh) -> Placed:
    """Parameters and optimizer state of `work` as `fit` puts them on such a mesh."""
    params = work.parameters()
    units = dict.fromkeys(("heads", "kv_heads"), head_size(work.config))
    homes, notes = shardings(work.axes(), params, mesh, units=units)
    params = jax.tree.map(_at, params, homes)
    trainable, _ = partition(params, work.method.rule)
    state = jax.eval_shape(optimizer(work.method.optimizer, trainable).init, trainable)
    return Placed(
        params, trainable, jax.tree.map(_at, state, follow(state, trainable, mesh)), notes
    )


def _at(leaf: Any, home: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)


def local_bytes(tree: PyTree) -> int:
    """Those of one device, of shapes that know where they live."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def memory(work: Work, place: Placed, update: Any, whole: bool = False) -> Memory:
    """Bytes of one device that has all rows of `work`; `update` is its compiled update.

    whole: compile the model in its full depth instead of extrapolating.
    """
    trained = local_bytes(place.trainable)
    gradients = 4 * sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(place.trainable)
    )
    step = in_depth(lambda counts: activations(work.deep(counts)), work.counts, whole)
    step += gathered(place.params) + gradients
    moving = update.memory_analysis().temp_size_in_bytes * share(place)
    return Memory(
        parameters=local_bytes(place.params),
        trained=trained,
        gradients=gradients,
        optimizer=local_bytes(place.optimizer),
        temporaries=round(max(step, moving) - gradients),
        batch=state_bytes(work.batch()),
    )


def activations(work: Work) -> int:
    """Bytes of the temporaries of forward and backward, of the compiled program."""
    method, params = work.method, work.parameters()
    program = gradients_lowered(work.objective, params, method.rule, work.batch())
    return program.compile(compiler_options=UNOPTIMISED).memory_analysis().temp_size_in_bytes


def compiled_update(work: Work) -> Any:
    """The optimizer's part of the step, in the model's full depth."""
    method = work.method
    lowered = update_lowered(method.optimizer, work.parameters(), method.rule)
    return lowered.compile(compiler_options=UNOPTIMISED)


def share(place: Placed) -> float:
    """The part of trained parameters and optimizer state that is one device's."""
    trees = (place.trainable, place.optimizer)
    return local_bytes(trees) / state_bytes(trees)


def gathered(params: Params) -> int:
    """Bytes of the tables outside the stacks that other devices hold, and that a step gathers. A
    layer's own are in the program: a scan reads them through a copy."""
    outside = [leaf for name, leaf in named_leaves(params) if not name.startswith("stack_")]
    return state_bytes(outside) - local_bytes(outside)
