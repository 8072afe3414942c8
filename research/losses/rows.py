"""Positions that carry loss, moved to the front of their row and cut into chunks.

Rows are never mixed: everything here is local to the batch axis, so that a batch sharded over
devices needs no communication beyond the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.types import Array, PyTree

# Positions of all rows together: 128 · V · 4 bytes of logits, 25 MB at V = 49152.
POSITIONS_PER_CHUNK = 128


def default_chunk(B: int, T: int) -> int:
    """Positions of one row so that all B rows together have about `POSITIONS_PER_CHUNK`."""
    return max(1, min(T, POSITIONS_PER_CHUNK // B))


@dataclass(frozen=True)
class Rows:
    """Each row's positions of non-zero weight first, padded with weight 0 to n whole chunks."""

    hidden: Array  # [B, n·c, D]
    targets: Array  # [B, n·c]
    weights: Array  # [B, n·c]
    order: Array  # [B, n·c]: the position each came from
    chunk: int  # c
    length: int  # T

    @property
    def count(self) -> int:
        """n, the number of chunks if every position carried loss."""
        return self.order.shape[1] // self.chunk

    def slice(self, i: Array) -> tuple[Array, Array, Array]:
        """Chunk i of hidden [B, c, D], targets and weights [B, c]."""
        start, axis = i * self.chunk, 1
        parts = self.hidden, self.targets, self.weights
        return tuple(lax.dynamic_slice_in_dim(x, start, self.chunk, axis) for x in parts)

    def place(self, whole: Array, part: Array, i: Array) -> Array:
        """`whole` [B, n·c, ...] with chunk i replaced by `part` [B, c, ...]."""
        return lax.dynamic_update_slice_in_dim(whole, part, i * self.chunk, axis=1)

    def restore(self, x: Array) -> Array:
        """[B, n·c, ...] -> [B, T, ...] in the original order."""
        back = jnp.argsort(self.order, axis=1)[:, : self.length]
        return jnp.take_along_axis(x, back.reshape(*back.shape, *[1] * (x.ndim - 2)), axis=1)

    def loop(self, body: Callable[[Array, Any], Any], init: Any) -> Any:
        """`body(i, carry)` over the chunks that hold loss; how many is known only at run time."""
        longest = (self.weights != 0).sum(axis=1).max()
        return lax.fori_loop(0, (longest + self.chunk - 1) // self.chunk, body, init)


def compact(hidden: Array, targets: Array, weights: Array, chunk: int | None) -> Rows:
    """Rows of hidden [B, T, D], targets and weights [B, T]; `chunk` by `default_chunk` if None."""
    if hidden.ndim != 3 or hidden.shape[:2] != targets.shape or targets.shape != weights.shape:
        raise ValueError(
            "expected hidden [B, T, D] with targets and weights [B, T]; got "
            f"{hidden.shape}, {targets.shape}, {weights.shape}"
        )
    B, T = targets.shape
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk counts positions, expected at least 1, got {chunk}")
    chunk = default_chunk(B, T) if chunk is None else min(chunk, T)
    weights = jnp.pad(weights, ((0, 0), (0, -T % chunk)))
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    source = jnp.minimum(order, T - 1)
    weights = jnp.take_along_axis(weights, order, axis=1)
    taken = jnp.take_along_axis(hidden, source[..., None], axis=1)
    return Rows(
        # What carries no loss may hold anything: 0 * inf would be nan in the head's gradient.
        hidden=jnp.where((weights != 0)[..., None], taken, 0),
        targets=jnp.take_along_axis(targets, source, axis=1),
        weights=weights,
        order=order,
        chunk=chunk,
        length=T,
    )


def per_position(
    of: Callable[[PyTree, Array, Array], Array],
    params: PyTree,
    hidden: Array,
    targets: Array,
    weights: Array | None = None,
    chunk: int | None = None,
) -> Array:
    """of(params, hidden [B, c, D], targets [B, c]) -> [B, c, ...] float32 for all chunks: [B, T, ...], 0
    where `weights` [B, T] is 0; None is 1 everywhere.

    Differentiable, and neither pass holds what `of` makes on its way, of all positions: the backward pass
    computes a chunk again. Chunks without any weight are skipped.
    """
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    rows = compact(hidden, targets, weights, chunk)

    @jax.checkpoint
    def score(params, h, y, w):
        found = of(params, h, y)
        return jnp.where((w != 0).reshape(*w.shape, *[1] * (found.ndim - 2)), found, 0)

    def skip(params, h, y, w):
        return jnp.zeros(jax.eval_shape(score, params, h, y, w).shape, jnp.float32)

    def body(_, i):
        h, y, w = rows.slice(i)
        return None, lax.cond((w != 0).any(), score, skip, params, h, y, w)

    _, parts = lax.scan(body, None, jnp.arange(rows.count))  # [n, B, c, ...]
    whole = jnp.moveaxis(parts, 0, 1)
    return rows.restore(whole.reshape(whole.shape[0], -1, *whole.shape[3:]))
