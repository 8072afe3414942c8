"""What the Pallas kernels are given: padded arrays, the mask as references, tables of tiles to visit.

The kernels share one way of cutting a problem into programs, so that each is only its loop. Arrays
stay [B, T, N, H]: nothing is transposed, and keys are not repeated for the query heads that share
them. Only what does not fill a tile, or a power of 2 in H, is padded first.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.kernels.dropout import kept
from research.kernels.mask import Mask
from research.kernels.online import MASKED, Score, bent, masked_scores
from research.kernels.tiles import Tiles, visit_table
from research.kernels.triton import Block, Tile, rows
from research.types import Array

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
WIDEST = 256
LARGEST_CONSTANT = 1 << 18  # tiles of a mask: 32k by 32k tokens in tiles of 64


@dataclass(frozen=True)
class Call:
    """What is static of a call beside shapes. offset: the mask's, where it is a Python int: the table
    of tiles may then be a constant."""

    score: Score
    interpret: bool
    offset: int | None


@dataclass(frozen=True)
class Problem:
    """Sizes of one call as the contract names them, and one kernel's tile. All static."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    tile: Tile
    call: Call

    @property
    def score(self) -> Score:
        return self.call.score

    @property
    def group(self) -> int:
        return self.N // self.K

    @property
    def blocks(self) -> tuple[int, int]:
        return self.tiles.counts(self.T, self.S)

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.tile.query, self.tile.key)

    @property
    def padded(self) -> tuple[int, int]:
        """T and S filled up to whole tiles."""
        query_blocks, key_blocks = self.blocks
        return query_blocks * self.tile.query, key_blocks * self.tile.key


def check_operands(q: Array, k: Array, v: Array, name: str) -> None:
    """ValueError for a head size or a dtype that a Pallas kernel cannot take."""
    H = q.shape[-1]
    if not 16 <= H <= WIDEST:
        raise ValueError(f"{name} takes heads of 16 to {WIDEST} numbers, not {H}")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        names = ", ".join(jnp.dtype(d).name for d in DTYPES)
        given = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise ValueError(f"{name} takes q, k and v of one dtype out of {names}; these are {given}")


def static_offset(mask: Mask) -> int | None:
    return int(mask.offset) if isinstance(mask.offset, Integral) else None


def problem(q: Array, k: Array, tile: Tile, call: Call) -> Problem:
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    tile = Tile(fitting(T, tile.query), fitting(S, tile.key), tile.warps, tile.stages)
    return Problem(B, T, S, N, K, power_of_two(H), tile, call)


def fitting(length: int, most: int) -> int:
    """The smallest tile of 16 or more that holds `length`, but at most `most`."""
    return min(most, max(16, power_of_two(length)))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def pad(x: Array, length: int, width: int | None = None) -> Array:
    """[B, T, ...] with zeros up to T = length, and up to `width` in the last axis."""
    fill = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    if width is not None:
        fill[-1] = (0, width - x.shape[-1])
    return jnp.pad(x, fill) if any(f != (0, 0) for f in fill) else x


def padded(p, q, k, v, out_grad, lse, delta):
    """Operands of a backward kernel in whole tiles; rows that are not there have seen nothing: lse is
    then what `online.finish` gives such a row."""
    T, S = p.padded
    more = ((0, 0), (0, 0), (0, T - p.T))
    q, out_grad = (pad(x, T, p.H) for x in (q, out_grad))
    k, v = (pad(x, S, p.H) for x in (k, v))
    return q, k, v, out_grad, jnp.pad(lse, more, constant_values=-MASKED), jnp.pad(delta, more)


def pad_mask(mask: Mask, p: Problem) -> Mask:
    """The mask with arrays in every place that is used: offset [1], segment ids padded with 0."""
    T, S = p.padded
    mask = mask.replace(offset=jnp.reshape(jnp.asarray(mask.offset, jnp.int32), 1))
    if mask.slopes is not None:
        mask = mask.replace(slopes=mask.slopes.astype(jnp.float32))
    if mask.query_segments is None:
        return mask
    return mask.replace(
        query_segments=pad(mask.query_segments.astype(jnp.int32), T),
        key_segments=pad(mask.key_segments.astype(jnp.int32), S),
    )


def table(mask: Mask, p: Problem, axis: int) -> Array:
    """`visit_table`, a constant of the program where nothing but static structure decides and it is not
    too large for one."""
    static = p.call.offset is not None and mask.prefix is None and mask.query_segments is None
    query_blocks, key_blocks = p.blocks
    if static and query_blocks * key_blocks <= LARGEST_CONSTANT:
        with jax.ensure_compile_time_eval():
            structure = Mask(mask.causal, mask.window, p.call.offset)
            return visit_table(structure, p.T, p.S, p.tiles, axis)
    return visit_table(mask, p.T, p.S, p.tiles, axis)


# The context of a kernel: mask, seed of dropout, table of tiles. Every kernel has its blocks along its
# program's first index and the batch row as its last.


def context(mask: Mask, seed: Array | None, visits: Array, p: Problem) -> tuple:
    return pad_mask(mask, p), seed, visits


def context_blocks(
    mask: Mask,
    seed: Array | None,
    visits: Array,
    p: Problem,
    reverse: bool = False,
    whole_table: bool = False,
) -> tuple:
    """Blocks of `context`; with `reverse` the programs go through the table's rows from its end."""
    T, S = p.padded
    rows_of_batch, last = visits.shape[0] > 1, visits.shape[1] - 1
    whole, row = (lambda *ids: (0,)), (lambda *ids: (ids[-1], 0))

    def visited(*ids: Array) -> tuple:
        return ids[-1] if rows_of_batch else 0, last - ids[0] if reverse else ids[0], 0, 0

    blocks = {
        "offset": Block((1,), whole),
        "prefix": Block((1,), lambda *ids: (ids[-1],)),
        "query_segments": Block((None, T), row),
        "key_segments": Block((None, S), row),
        "slopes": Block((p.N,), whole),
    }
    if whole_table:
        rows_seen = Block((None, *visits.shape[1:]), lambda *ids: (visited(*ids)[0], 0, 0, 0))
    else:
        rows_seen = Block((None, None, *visits.shape[2:]), visited)
    used = {name: block for name, block in blocks.items() if getattr(mask, name) is not None}
    seed_block = None if seed is None else Block((2,), whole)
    return mask.replace(**used), seed_block, rows_seen


# Inside a kernel.


@dataclass(frozen=True)
class View:
    """Mask and seed as a program sees them, for tiles [queries, keys], or transposed [keys, queries]."""

    problem: Problem
    mask: Any
    seed: Any
    batch: Array
    transposed: bool = False

    def scores(self, product: Array, n: Array, i: Array, j: Array, masked: bool) -> tuple:
        """(scores of the tile with what is unseen at MASKED, the same before the mask and ALiBi)."""
        capped = bent(product, self.problem.score)
        query, key = self.places(i, j)
        mask = self.mask.replace(
            offset=self.mask.offset[0],
            prefix=None if self.mask.prefix is None else self.mask.prefix[0],
            slopes=None if self.mask.slopes is None else self.mask.slopes[n],
        )
        if masked and self.mask.query_segments is not None:
            mask = mask.replace(
                query_segments=self.queries(self.piece(self.mask.query_segments, i, True)),
                key_segments=self.keys(self.piece(self.mask.key_segments, j, False)),
            )
        return masked_scores(capped, mask, query, key, self.problem.S, masked), capped

    def kept(self, n: Array, i: Array, j: Array) -> Array | None:
        """What dropout multiplies the tile's probabilities with, if there is dropout."""
        if self.seed is None:
            return None
        query, key = self.places(i, j)
        words = self.seed[0], self.seed[1]
        return kept(words, self.batch * self.problem.N + n, query, key, self.problem.score.rate)

    def gaps(self, i: Array, j: Array) -> Array:
        """The distances that ALiBi multiplies, float32."""
        query, key = self.places(i, j)
        return (key - query - self.mask.offset[0]).astype(jnp.float32)

    def places(self, i: Array, j: Array) -> tuple[Array, Array]:
        tile = self.problem.tile
        query = i * tile.query + lax.iota(jnp.int32, tile.query)
        key = j * tile.key + lax.iota(jnp.int32, tile.key)
        return self.queries(query), self.keys(key)

    def piece(self, ref: Any, block: Array, queries: bool) -> Array:
        return rows(ref, block, self.problem.tile.query if queries else self.problem.tile.key)

    def queries(self, x: Array) -> Array:
        return x[None, :] if self.transposed else x[:, None]

    def keys(self, x: Array) -> Array:
        return x[:, None] if self.transposed else x[None, :]
