"""Where tokens stand in a prefix language model of the GLM kind, read in the tokens themselves.

Du et al. 2022, GLM (arXiv:2103.10360), as ChatGLM-6B has it in its final release: a prompt is text
with a mask token in it, then a start token, then the answer.

    tokens            x0  x1  [gMASK]  sop  y1  y2
    first position     0   1    2       2    2   2     pinned at the mask token
    second position    0   0    0       1    2   3     counted from the start token on
    seen by all       yes yes  yes      -    -   -     the start token and what follows: causal

The context is bidirectional, so a prompt has to be read in one call, and rows cannot be packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from research.kernels.mask import Mask
from research.models.position import Rope2d
from research.types import Array


@struct.dataclass
class Context:
    """What is known of each row, [B] int32; -1 where it has not been read yet.

    start   the start token's index among the row's real tokens
    pinned  the mask token's
    prefix  the start token's slot: the columns before it are open to every query
    """

    start: Array
    pinned: Array
    prefix: Array


@dataclasses.dataclass(frozen=True)
class PrefixRope2d(Rope2d):
    """Rope2d at the positions above.

    Of `mask_ids` the first that stands before the start token is the one that pins. A row that
    lacks one of both, or has tokens of two segments, is a ValueError where its tokens are known
    (outside jit) and nan under jit. Positions [B, T, 2] given from outside are left as they are;
    then the mask should come with them.
    """

    start_id: int = 130_004
    mask_ids: tuple[int, ...] = (130_001, 130_000)

    def context(self, batch: int) -> Context:
        return Context(*[jnp.full((batch,), -1, jnp.int32)] * 3)

    def place(
        self, tokens: Array, positions: Array, mask: Mask, context: Context | None
    ) -> tuple[Array, Mask, Context | None]:
        if positions.ndim == 3:
            return positions, mask, context
        B, T = tokens.shape
        positions = jnp.broadcast_to(positions, (B, T))
        segments = jnp.ones((B, T), jnp.int32)
        segments = segments if mask.query_segments is None else mask.query_segments
        known = self.context(B) if context is None else context
        read = self._read(tokens, positions, segments != 0, mask.offset, known)
        if mask.prefix is None:
            mask = mask.replace(prefix=jnp.maximum(read.prefix, 0))
        return _positions(positions, segments, read), mask, None if context is None else read

    def _read(
        self, tokens: Array, positions: Array, real: Array, offset: int | Array, known: Context
    ) -> Context:
        """What the new tokens add to what is known."""
        starts = real & (tokens == self.start_id)
        slots = jnp.broadcast_to(jnp.arange(tokens.shape[1]) + offset, tokens.shape)
        start = _first(starts, positions, known.start)
        pinned, before = known.pinned, real & (positions < start[:, None])
        for mask_id in self.mask_ids:
            pinned = _first(before & (tokens == mask_id), positions, pinned)
        return Context(start, pinned, _first(starts, slots, known.prefix))

    def missing(self, prompt: Sequence[int]) -> str | None:
        ids = [int(token) for token in prompt]
        if self.start_id not in ids:
            return f"lacks the start token {self.start_id}"
        if not set(ids[: ids.index(self.start_id)]) & set(self.mask_ids):
            return f"has none of the mask tokens {self.mask_ids} before its start token"
        return None


def _first(hits: Array, values: Array, known: Array) -> Array:
    """[B]: `known` where it is, else the value at the row's first hit, else -1."""
    at = jnp.argmax(hits, axis=1)[:, None]
    found = jnp.where(hits.any(axis=1), jnp.take_along_axis(values, at, axis=1)[:, 0], -1)
    return jnp.where(known >= 0, known, found)


def _positions(positions: Array, segments: Array, read: Context) -> Array:
    """[B, T, 2] int32: 0 for padding, -1 in rows that cannot be placed."""
    real = segments != 0
    alone = (~real | (segments == segments.max(axis=1, keepdims=True))).all(axis=1)
    placed = alone & (read.start >= 0) & (read.pinned >= 0)
    _require_placed(placed | ~real.any(axis=1))
    start, pinned = read.start[:, None], read.pinned[:, None]
    after = positions >= start
    both = (jnp.where(after, pinned, positions), jnp.where(after, positions - start + 1, 0))
    both = jnp.where(placed[:, None, None], jnp.stack(both, axis=-1), -1)
    return jnp.where(real[..., None], both, 0)


def _require_placed(placed: Array) -> None:
    if not isinstance(placed, jax.core.Tracer) and not placed.all():
        row = int(jnp.argmin(placed))
        raise ValueError(
            f"row {row} is not one prompt with a mask token and then a start token: its tokens "
            "have no positions"
        )
