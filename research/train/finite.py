"""A loss, gradient or update that is not finite stops the run and says where it went wrong."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from research.paths import named_leaves
from research.train.state import TrainState
from research.train.step import Metrics, accumulated_gradients, split_batch
from research.types import Batch, Objective, Params, PyTree

_WATCHED = {"loss": "objective", "grad_norm": "grad_norm", "update_norm": "update_norm"}
_SHOWN = 12


class NonFiniteError(FloatingPointError):
    """Training met a NaN or an infinity."""


def wrong_values(metrics: Metrics) -> dict[str, float]:
    """Those of loss, grad_norm and update_norm that are not finite. Waits for the step."""
    values = {shown: float(metrics[name].total) for shown, name in _WATCHED.items()}
    return {name: value for name, value in values.items() if not math.isfinite(value)}


def diagnose(
    objective: Objective,
    state: TrainState,
    frozen: Params,
    context: Any,
    batch: Batch,
    accumulate: int,
    wrong: dict[str, float],
) -> NonFiniteError:
    """The error of a step that went wrong, from `state` as it was before that step.

    Gradients are computed once more to name the leaves; parameters and the batch are looked at too.
    """
    gradients = jax.jit(
        lambda state, frozen, context, batch: accumulated_gradients(
            objective, state, frozen, context, split_batch(batch, accumulate), accumulate
        )
    )
    bare = state.replace(source_state=None, opt_state=None, ema=None)
    _, _, grads = gradients(bare, frozen, context, batch)
    found = {
        "gradients": bad_leaves(grads),
        "parameters": bad_leaves((state.trainable, frozen)),
        "batch": bad_leaves(batch),
    }
    where = "; ".join(f"{kind}: {_listed(names)}" for kind, names in found.items() if names)
    if not where:
        norms = set(wrong) - {"update_norm"}
        where = "no leaf (a norm overflowed)" if norms else "the optimizer's update alone"
    values = ", ".join(f"{name} = {value}" for name, value in wrong.items())
    return NonFiniteError(
        f"step {int(state.step)}: {values}. Not finite in {where}. "
        f"Batch: {describe_batch(batch)}. The state before this step is unharmed"
    )


def bad_leaves(tree: PyTree) -> list[str]:
    """Paths of the leaves that hold a NaN or an infinity."""
    bad = []
    for name, leaf in named_leaves(tree):
        array = (
            np.asarray(leaf) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else 0
        )
        if jax.numpy.issubdtype(np.result_type(array), np.inexact):
            bad += [] if np.isfinite(array.astype(np.float32)).all() else [name]
    return bad


def describe_batch(batch: Batch) -> str:
    """Shapes of the leaves, and the row indices when the Source gives them as `indices`."""
    shapes = [f"{name} {leaf.dtype}{list(np.shape(leaf))}" for name, leaf in named_leaves(batch)]
    rows = batch.get("indices") if isinstance(batch, dict) else None
    indices = [] if rows is None else [f"indices {np.asarray(rows).reshape(-1).tolist()[:64]}"]
    return ", ".join(indices + shapes)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
