"""Where tokens stand: the mask and the positions of new tokens, and their slots of the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from research.kernels.mask import Mask
from research.models.attention import Cache
from research.models.position import NoPosition
from research.types import Array


def segment_positions(segment_ids: Array) -> Array:
    """[B, T] -> each token's index within its run of equal ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def arrange(
    tokens: Array,
    positions: Array | None,
    segment_ids: Array | None,
    mask: Mask,
    cache: Cache | None,
    scheme: NoPosition = NoPosition(),
) -> tuple[Mask, Array, Cache | None]:
    """Mask and positions of the new tokens, and the cache with their slots taken.

    ValueError when `mask` says what segment_ids or the cache say too, or the cache is full.
    """
    B, T = tokens.shape
    if mask.query_segments is not None and (segment_ids is not None or cache is not None):
        raise ValueError("segments come from `segment_ids` (with a cache, always), not from `mask`")
    if cache is None:
        if segment_ids is not None:
            mask = mask.replace(query_segments=segment_ids, key_segments=segment_ids)
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)
        elif positions is None:
            positions = jnp.arange(T, dtype=jnp.int32)[None]
        positions, mask, _ = scheme.place(tokens, positions, mask, None)
        return mask, positions, None
    require_room(cache, T)
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    real = (segment_ids != 0).astype(jnp.int32)
    if positions is None:
        positions = jnp.maximum(cache.lengths[:, None] + jnp.cumsum(real, axis=1) - 1, 0)
    keys = cache.segment_ids
    if keys is not None:
        keys = jax.lax.dynamic_update_slice(keys, segment_ids, (0, cache.index))
    mask = mask.replace(offset=cache.index, query_segments=segment_ids, key_segments=keys)
    positions, mask, context = scheme.place(tokens, positions, mask, cache.context)
    taken = cache.replace(
        segment_ids=keys,
        index=cache.index + T,
        lengths=cache.lengths + real.sum(axis=1),
        context=context,
    )
    return mask, positions, taken


def require_room(cache: Cache, T: int) -> None:
    """ValueError when T more tokens do not fit, where the index is known (outside jit)."""
    if cache.segment_ids is None:
        return
    slots = cache.segment_ids.shape[1]
    if not isinstance(cache.index, jax.core.Tracer) and int(cache.index) + T > slots:
        raise ValueError(f"the cache holds {int(cache.index)} of {slots} tokens, no room for {T}")


def require_positions(most: int | None, positions: Array | int) -> None:
    """ValueError when one is not in 0..most-1, where they are known (outside jit).

    Under jit such a token is embedded as nan, which no loss survives unseen.
    """
    if most is None or isinstance(positions, jax.core.Tracer):
        return
    last = int(np.max(positions))
    if last >= most:
        raise ValueError(f"a token stands at position {last}; there are positions 0..{most - 1}")
