"""The start of a run: leaves split into trained and frozen, everything on the mesh, a first state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from research.train.partition import Rule, partition
from research.train.sharding import follow, on_mesh, shardings
from research.train.state import TrainState, initial_state, source_init_rng, training_rng
from research.types import Params, PyTree, Source


def place(
    params: Params,
    context: Any,
    rule: Rule,
    mesh: Mesh | None,
    names: PyTree | None = None,
    units: Mapping[str, int] | None = None,
) -> tuple[Params, Params, Any]:
    """(trainable, frozen, context), sharded over the mesh when there is one. Axes that the mesh
    does not divide are printed and replicated."""
    if mesh is None:
        return (*partition(params, rule), context)
    if names is not None:
        homes, notes = shardings(names, params, mesh, units=units)
        for note in notes:
            print(note, flush=True)
        params = jax.device_put(params, homes)
    return (*partition(on_mesh(params, mesh), rule), on_mesh(context, mesh))


def start(
    trainable: Params,
    update: optax.GradientTransformation,
    source: Source,
    seed: int,
    ema: bool,
    mesh: Mesh | None,
) -> TrainState:
    """The state before the first step; optimizer state is made where its parameters live."""
    rng = training_rng(seed)
    homes = None
    if mesh is not None:
        homes = follow(jax.eval_shape(update.init, trainable), trainable, mesh)
    init = jax.jit(update.init, out_shardings=homes)
    state = initial_state(trainable, update._replace(init=init), rng, ema=ema)
    state = state if mesh is None else on_mesh(state, mesh)
    return state.replace(source_state=source.init(source_init_rng(rng)))
