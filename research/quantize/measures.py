"""Measurements of a matrix's inputs x [M, in], for `calibrate.measure`, and how batches combine.

absmax      the largest magnitude of each feature [in]; combine with jnp.maximum
second      the sum of x xᵀ over rows [in, in], half of a layer's Hessian; with jnp.add. SecondOfWindows
            weighs the first token of a window
magnitude   the sum of |x| of each feature and the number of rows; with jnp.add
moments     both sums and the number of rows; with jnp.add
Sample      some rows themselves [rows, in]; with `join`
Histogram   counts of |x| of all features in bins from 0 to what is given [bins]; with `count`
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from research.codes.blocks import SMALLEST
from research.types import Array


def absmax(x: Array) -> Array:
    return jnp.abs(x.astype(jnp.float32)).max(axis=0)


def second(x: Array) -> dict[str, Array]:
    x = x.astype(jnp.float32)
    return {"sum": x.T @ x, "rows": jnp.float32(x.shape[0])}


@dataclass(frozen=True)
class SecondOfWindows:
    """`second`, in which the first of every `length` rows counts `first` times."""

    length: int
    first: float

    def __call__(self, x: Array) -> dict[str, Array]:
        x = x.astype(jnp.float32)
        weights = jnp.where(jnp.arange(x.shape[0]) % self.length == 0, self.first, 1.0)
        return {"sum": (x * weights[:, None]).T @ x, "rows": weights.sum()}


def magnitude(x: Array) -> dict[str, Array]:
    x = jnp.abs(x.astype(jnp.float32))
    return {"sum": x.sum(axis=0), "rows": jnp.float32(x.shape[0])}


def moments(x: Array) -> dict[str, Array]:
    x = x.astype(jnp.float32)
    return {"magnitude": jnp.abs(x).sum(axis=0), "second": x.T @ x, "rows": jnp.float32(x.shape[0])}


@dataclass(frozen=True)
class Sample:
    """`rows` of each pass's rows, as far apart as they can be; of a smaller pass some twice."""

    rows: int

    def __call__(self, x: Array) -> Array:
        return x[jnp.arange(self.rows) * x.shape[0] // self.rows].astype(jnp.float32)


def join(a: Array, b: Array) -> Array:
    return jnp.concatenate([a, b], axis=-2)


@dataclass(frozen=True)
class Histogram:
    """Magnitudes in `bins` of one size between 0 and `top`, a scalar; larger ones are in the last."""

    bins: int

    def __call__(self, x: Array, top: Array) -> Array:
        width = jnp.maximum(top, SMALLEST) / self.bins
        at = jnp.minimum(jnp.abs(x.astype(jnp.float32)) / width, self.bins - 1).astype(jnp.int32)
        return jnp.zeros(self.bins, jnp.float32).at[at.reshape(-1)].add(1)


def count(a: Array, b: Array) -> np.ndarray:
    """a + b in float64: float32 counts no further than 2^24."""
    return np.asarray(a, np.float64) + np.asarray(b, np.float64)
