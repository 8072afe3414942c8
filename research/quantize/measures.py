"""Measurements of a matrix's inputs x [M, in], for `calibrate.measure`, and how batches combine.

absmax      the largest magnitude of each feature [in]; combine with jnp.maximum
second      the sum of x xᵀ over rows [in, in], half of a layer's Hessian; with jnp.add
magnitude   the sum of |x| of each feature and the number of rows; with jnp.add
"""

from __future__ import annotations

import jax.numpy as jnp

from research.types import Array


def absmax(x: Array) -> Array:
    return jnp.abs(x.astype(jnp.float32)).max(axis=0)


def second(x: Array) -> dict[str, Array]:
    x = x.astype(jnp.float32)
    return {"sum": x.T @ x, "rows": jnp.float32(x.shape[0])}


def magnitude(x: Array) -> dict[str, Array]:
    x = jnp.abs(x.astype(jnp.float32))
    return {"sum": x.sum(axis=0), "rows": jnp.float32(x.shape[0])}
