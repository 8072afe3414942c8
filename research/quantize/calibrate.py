"""Statistics of a model's activations over text: what every algorithm here is calibrated with.

    found = calibrate.measure(model, params, windows, rule, measures.absmax, jnp.maximum)
    found["stack_0/block_0/ffn/down/kernel"]     # [L, in]: the largest magnitude of each input

A measurement is a function of one matrix's inputs [M, in] in one pass, and a way of combining those of
several passes. It is reduced where the inputs are (`weights.observed`), so that no activation is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.paths import map_named, named_leaves
from research.types import Array, Params
from research.weights import observed

Statistics = dict[str, Any]  # {path of a matrix: its statistic, with the layer axis of a stack}


def windows_of(ids: Sequence[int], length: int, count: int) -> np.ndarray:
    """The first `count` windows of `length` tokens, [count, length]; ValueError when there are fewer."""
    if count < 1 or len(ids) < count * length:
        raise ValueError(
            f"calibration needs at least one window, and {count} of {length} tokens need "
            f"{count * length}; the text has {len(ids)} tokens"
        )
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def measure(
    model: Any,
    params: Params,
    windows: np.ndarray,
    rule: str,
    measurement: observed.Measure,
    combine: Callable[[Array, Array], Array],
    batch_size: int = 4,
    given: Statistics | None = None,
) -> Statistics:
    """{path: statistic} of the inputs of every matrix that `rule` matches whole, over all windows.

    windows [n, T] of tokens, without padding. `combine` joins two batches' statistics leaf by leaf
    (jnp.maximum, jnp.add). given: a second argument of the measurement, for each path and layer.
    ValueError without a window, RuleError when the rule matches nothing.
    """
    watched = observed.add(params, rule, measurement, given)
    return gather(_logits, model, watched, batches_of(windows, batch_size), combine)


def batches_of(windows: np.ndarray, batch_size: int) -> list[Array]:
    """windows [n, T] as arrays [batch_size or fewer, T]; ValueError without a window."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if np.ndim(windows) != 2:
        raise ValueError(f"windows must be [n, T] of tokens, not {np.shape(windows)}")
    if not len(windows):
        raise ValueError("calibration needs at least one window of tokens, there is none")
    starts = range(0, len(windows), batch_size)
    return [jnp.asarray(windows[start : start + batch_size]) for start in starts]


def gather(
    forward: Callable[[Any, Params, Any], Array],
    module: Any,
    watched: Params,
    batches: Sequence[Any],
    combine: Callable[[Array, Array], Array],
) -> Statistics:
    """{path: statistic} of the observers in `watched`, over `forward(module, watched, batch)`.

    The function and the module are compiled once, if they are equal to those of the last call.
    """
    found: Any = None
    for batch in batches:
        statistics = _pass(forward, module, watched, batch)
        found = statistics if found is None else jax.tree.map(combine, found, statistics)
    return found


def _logits(model: Any, params: Params, tokens: Array) -> Array:
    return model.apply({"params": params}, tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _pass(forward: Callable, module: Any, watched: Params, batch: Any) -> Statistics:
    nodes = dict(named_leaves(watched, is_leaf=observed.is_observed))
    zeros = {name: w.statistic for name, w in nodes.items() if observed.is_observed(w)}

    def total(statistics: Statistics) -> Array:
        return forward(module, _with(watched, statistics), batch).sum()

    return jax.grad(total)(zeros)


def _with(params: Params, statistics: Statistics) -> Params:
    """`params` whose observers have these statistics."""

    def put(name: str, w: Any) -> Any:
        return w.replace(statistic=statistics[name]) if observed.is_observed(w) else w

    return map_named(put, params, is_leaf=observed.is_observed)
