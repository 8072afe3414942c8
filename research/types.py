"""The words the whole codebase shares: axis letters, tree aliases, Mean, Objective.

Axis letters (those of `jax.nn.dot_product_attention`, extended). One letter, one meaning, in
einsum strings, docstrings and comments:

    B  batch                    N  query heads             D  model width
    T  query (target) length    K  key/value heads         F  feed-forward width
    S  key (source) length      G  N // K, group size      V  vocabulary
    L  layers                   H  head size               R  rank
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
PyTree = Any
Params = Any  # a nested dict whose leaves are arrays or Weights
Batch = dict[str, Any]


@struct.dataclass
class Mean:
    """A mean that can be added across micro-batches, devices and steps: total / count."""

    total: Array
    count: Array

    @classmethod
    def of(cls, values: Array, weights: Array | None = None) -> Mean:
        """Mean of `values`, weighted by `weights` of the same shape when given."""
        values = jnp.asarray(values, jnp.float32)
        if weights is None:
            return cls(values.sum(), jnp.asarray(values.size, jnp.float32))
        weights = jnp.asarray(weights, jnp.float32)
        return cls((values * weights).sum(), weights.sum())

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Array:
        """total / count; 0 where nothing was counted."""
        return self.total / jnp.where(self.count == 0, 1, self.count)


# (params, context, batch, rng) -> (loss, metrics). The loss is a weighted *sum*: the batch carries
# weights already divided by the counts of the whole optimizer step, so that micro-batches and
# devices only add. Metrics are `Mean`s, which add too.
Objective = Callable[[Params, Any, Batch, Array], tuple[Array, dict[str, Mean]]]


class Source(NamedTuple):
    """Where batches come from: two functions, in the manner of an optax transformation.

    init(rng) -> state
    next(state, params, context, rng, last_metrics) -> (batch, state)

    `state` is a small pytree of integers and arrays and is checkpointed, so that a resumed run goes
    on with the batch that would have come next. The batch's weights are already divided by their
    sums over the whole optimizer step.
    """

    init: Callable[[Array], PyTree]
    next: Callable[..., tuple[Batch, PyTree]]
