"""Which tiles of the T×S scores a kernel visits, and what is masked inside one.

A tile is `Tiles.query` queries by `Tiles.key` keys. `tile_states` says of every tile whether it is
empty (skip it), full (no mask needed) or partial; `visits` turns that into the list a loop follows.
The forward pass reads the table by rows (the key blocks of a query block), the backward pass by
columns. The block mask of FlexAttention (Dong et al. 2024, arXiv:2412.05496) is the same idea.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from research.kernels.mask import Mask
from research.types import Array

EMPTY, PARTIAL, FULL = 0, 1, 2
FAR = 2**30  # beyond every position


@dataclass(frozen=True)
class Tiles:
    """Tile sizes in positions. Hashable: they are static."""

    query: int
    key: int

    def counts(self, T: int, S: int) -> tuple[int, int]:
        """(query blocks, key blocks); the last ones may be padded."""
        return -(-T // self.query), -(-S // self.key)


def tile_states(mask: Mask, T: int, S: int, tiles: Tiles) -> Array:
    """EMPTY, PARTIAL or FULL for each tile: int32 [B or 1, query blocks, key blocks].

    Exact for causal, window and offset (a tile is EMPTY only if nothing in it is visible, and FULL
    only if all is). Segments are judged by the range of ids in a block, prefix by whole blocks:
    there a PARTIAL tile may hold nothing or everything, but EMPTY and FULL are always true.
    Padded keys make a tile PARTIAL; padded queries count for nothing.
    """
    query_blocks, key_blocks = tiles.counts(T, S)
    first_query = jnp.arange(query_blocks)[:, None] * tiles.query + mask.offset
    last_query = jnp.minimum(first_query + tiles.query, T + mask.offset) - 1
    first_key = jnp.arange(key_blocks)[None, :] * tiles.key
    last_key = jnp.minimum(first_key + tiles.key, S) - 1

    # The gaps (key - query) of a tile are a whole interval, and so are the gaps that are allowed.
    least, most = first_key - last_query, last_key - first_query
    low, high = allowed_gaps(mask)
    some = (jnp.maximum(least, low) <= jnp.minimum(most, high))[None]
    every = ((low <= least) & (most <= high))[None]
    if mask.prefix is not None:
        prefix = mask.prefix[:, None, None]
        some, every = some | (first_key < prefix), every | (last_key < prefix)
    if mask.query_segments is not None:
        overlap, uniform = _segment_states(mask, tiles)
        some, every = some & overlap, every & uniform
    every &= first_key + tiles.key <= S
    return jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY)


def allowed_gaps(mask: Mask) -> tuple[int, int]:
    """The least and the greatest `j - (offset + i)` that causal and window allow, inclusive."""
    reach = FAR if mask.window is None else mask.window - 1
    return -reach, 0 if mask.causal else reach


def _segment_states(mask: Mask, tiles: Tiles) -> tuple[Array, Array]:
    """(id ranges overlap, one and the same id throughout), each [B, query blocks, key blocks]."""
    query_least, query_most, query_whole = _id_range(mask.query_segments, tiles.query)
    key_least, key_most, key_whole = _id_range(mask.key_segments, tiles.key)
    query_least, query_most, query_whole = (
        x[:, :, None] for x in (query_least, query_most, query_whole)
    )
    key_least, key_most, key_whole = (x[:, None, :] for x in (key_least, key_most, key_whole))
    overlap = (query_least <= key_most) & (key_least <= query_most)
    same = (query_least == key_most) & (query_most == key_least)
    return overlap, overlap & same & query_whole & key_whole


def _id_range(segments: Array, block: int) -> tuple[Array, Array, Array]:
    """Least and greatest id other than 0 in each block, and whether there is no 0 in it.

    A block of padding alone gives an empty range, which overlaps nothing. The end padding of the
    last block does not count as 0 here: it decides nothing for queries, and `tile_states` looks
    at keys itself.
    """
    B, length = segments.shape
    real = segments != 0
    fill = (0, -length % block)
    limits = jnp.iinfo(jnp.int32)

    def blocks(values: Array, padding: int | bool) -> Array:
        padded = jnp.pad(values, ((0, 0), fill), constant_values=padding)
        return padded.reshape(B, -1, block)

    least = blocks(jnp.where(real, segments, limits.max), limits.max).min(-1)
    most = blocks(jnp.where(real, segments, limits.min), limits.min).max(-1)
    return least, most, blocks(real, True).all(-1)


def visits(wanted: Array) -> tuple[Array, Array]:
    """[..., blocks] bool -> (indices of the wanted blocks first, in order; how many there are)."""
    order = jnp.argsort(~wanted, axis=-1, stable=True)
    return order.astype(jnp.int32), wanted.sum(-1, dtype=jnp.int32)


def tile_visible(mask: Mask, i: Array, j: Array, S: int) -> Array:
    """Visibility inside one tile, as `mask.to_dense` has it, for positions i and j.

    `mask` is that of the tile: a scalar prefix, and segment ids of just these queries and keys.
    i and query ids, j and key ids are broadcast against each other, so that the tile comes out in
    the orientation in which they came. Keys at or beyond S are padding and never seen.
    """
    gap = j - (i + mask.offset)
    low, high = allowed_gaps(mask)
    visible = gap <= high
    if mask.window is not None:
        visible &= gap >= low
    if mask.prefix is not None:
        visible |= j < mask.prefix
    if mask.query_segments is not None:
        visible &= (mask.query_segments == mask.key_segments) & (mask.key_segments != 0)
    return visible & (j < S)


def visit_table(mask: Mask, T: int, S: int, tiles: Tiles, axis: int) -> Array:
    """For each block of the other axis, which blocks along `axis` (1: queries, 2: keys) to visit.

    int32 [B or 1, blocks, 2, 1 + others]: [..., 0, :] the full ones, [..., 1, :] the partial ones,
    each as a count and then so many block indices in ascending order.
    """
    states = jnp.moveaxis(tile_states(mask, T, S, tiles), axis, -1)
    wanted = jnp.stack([states == FULL, states == PARTIAL], -2)
    order, count = visits(wanted)
    return jnp.concatenate([count[..., None], order], -1)


def walk(
    step: Callable, table: Any, carry: Any, *row: Array, share: tuple[Any, int] = (0, 1)
) -> Any:
    """`carry = step(block, carry, masked)` over a row of `visit_table`: first the full tiles, then the
    partial ones. The table, or its one row, is an array or, in a Pallas kernel, a reference.

    share=(part, parts): only every parts-th tile, from number `part` on.
    """
    part, parts = share
    for kind, masked in enumerate((False, True)):

        def body(n, carry, kind=kind, masked=masked):
            return step(table[*row, kind, 1 + part + n * parts], carry, masked)

        count = table[*row, kind, 0]
        if parts > 1:
            count = lax.div(count - part + parts - 1, jnp.asarray(parts, count.dtype))
        carry = lax.fori_loop(0, count, body, carry)
    return carry


def to_groups(x: Array, K: int, block: int) -> Array:
    """[B, T, K*G, H] -> [B*K, blocks, G*block, H], padded with zeros at the end: a group is one key/value
    head of one batch row, and rows are ordered (query head, position)."""
    B, T, N, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, 0)))
    x = x.reshape(B, -1, block, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(B * K, -1, N // K * block, H)


def from_groups(x: Array, B: int, T: int, block: int) -> Array:
    """The inverse of `to_groups`: [B, T, K*G, H]."""
    groups, blocks, rows, H = x.shape
    x = x.reshape(B, groups // B, blocks, rows // block, block, H).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, blocks * block, -1, H)[:, :T]
