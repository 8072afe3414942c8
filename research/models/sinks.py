"""Attention that keeps the first tokens and a rolling window, in a cache that does not grow.

A rolling buffer of the last `window` keys: Mistral 7B (Jiang et al. 2023, arXiv:2310.06825). With
the first `sinks` tokens kept beside it: StreamingLLM (Xiao et al. 2023, arXiv:2309.17453), by which
a model that was trained on windows of some length reads and writes without an end.

Query t sees key k when 0 <= t - k < window, or k < sinks, in the same segment. Positions are
counted within the cache, as the paper has it: sinks stand at 0..sinks-1, the window after them, and
nothing is ever further away than sinks + window - 1. Every query is treated so, in whatever chunks
the tokens come, so that reading at once is the same function as reading one by one.

Differs from the paper's code: a long prompt that is read at once attends there with its own
positions, and is cut down to the window only afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from research.kernels.attend import masked_softmax
from research.models.attention import Attention, Inputs, LayerCache, require_plain
from research.models.decoder import DecoderConfig
from research.models.layers import Linear
from research.types import Array


@struct.dataclass
class RollingCache:
    """Keys before rotation and values [B, R, K, H], R = sinks + window slots, with for each slot
    its token's position in the row and segment [B, R]; segment 0 is an empty slot."""

    keys: Array
    values: Array
    positions: Array
    segments: Array

    def __add__(self, new: RollingCache) -> RollingCache:
        """The slots of both, [B, R + T, ...]."""
        pairs = ((getattr(self, f.name), getattr(new, f.name)) for f in dataclasses.fields(self))
        return RollingCache(*(jnp.concatenate(pair, axis=1) for pair in pairs))


class StreamingAttention(Attention):
    """Attention with a `window` and `sinks`, and a RollingCache; parameters are Attention's own.

    Without sinks and without a cache it is Attention itself, with any kernel. Otherwise the scores
    are built whole, [B, N, T, sinks + window + T]. ValueError without a window, in cross-attention,
    with a prefix-LM mask, with positions that are not one number a token, for dropout and a soft cap.
    """

    sinks: int = 0

    @nn.compact
    def __call__(
        self,
        x: Array,
        inputs: Inputs,
        cache: RollingCache | None = None,
        memory: Array | LayerCache | None = None,
    ) -> tuple[Array, RollingCache | LayerCache | None]:
        if cache is None and not self.sinks:
            return super().__call__(x, inputs, None, memory)
        self._check(inputs, memory)
        B, T, D = x.shape
        q = self._heads("q", self.heads, "heads")(x).reshape(B, T, self.heads, self.head_size)
        k, v = self._keys_values(x)
        segments = inputs.mask.query_segments
        segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
        new = RollingCache(k, v, jnp.broadcast_to(inputs.positions, (B, T)), segments)
        seen = new if cache is None else cache + new
        y = self._look(q, new, seen, inputs).astype(x.dtype).reshape(B, T, -1)
        cache = None if cache is None else roll(cache, new, self.window, self.sinks)
        return Linear(D, ("heads", "embed"), self.out_bias, name="o")(y), cache

    def _check(self, inputs: Inputs, memory: Any) -> None:
        wrong = {
            "has no window": self.window is None,
            "has no memory to look at": memory is not None,
            "has no prefix-LM or bidirectional mask": inputs.mask.prefix is not None
            or not inputs.mask.causal,
            "has no soft cap": self.softcap is not None,
            "has no dropout of probabilities": self.dropout > 0 and self.has_rng("dropout"),
            "counts positions as one number a token": getattr(inputs.positions, "ndim", 0) != 2,
        }
        if any(wrong.values()):
            raise ValueError(
                "StreamingAttention " + "; it ".join(w for w, is_so in wrong.items() if is_so)
            )

    def _look(self, q: Array, new: RollingCache, seen: RollingCache, inputs: Inputs) -> Array:
        """softmax over the visible slots of `seen` [B, S, ...]: -> [B, T, N, H]."""
        B, T, N, H = q.shape
        at, keys_at = new.positions[:, :, None], seen.positions[:, None, :]  # [B, T, 1], [B, 1, S]
        near, sink = at - keys_at < self.window, keys_at < self.sinks
        visible = (at >= keys_at) & (near | sink)
        visible &= (new.segments[:, :, None] == seen.segments[:, None, :]) & (
            seen.segments[:, None, :] != 0
        )
        last = self.sinks + self.window - 1
        base = jnp.maximum(new.positions.min(axis=1, keepdims=True) - last, 0)  # [B, 1]
        is_sink = seen.positions < self.sinks
        stands = jnp.where(is_sink, seen.positions, jnp.maximum(seen.positions - base, 0))
        keys = self._rotated(seen.keys.astype(q.dtype), stands, inputs)
        scores = self._scores(self._rotated(q, new.positions - base, inputs), keys)
        distance = keys_at - at
        if self.sinks:
            clipped = jnp.minimum(new.positions, last)
            to_sinks = self._scores(self._rotated(q, clipped, inputs), keys)
            scores = jnp.where(sink[:, None], to_sinks, scores)
            distance = jnp.where(sink, keys_at - clipped[:, :, None], distance)
        slopes = inputs.position.slopes(N) if inputs.mask.slopes is None else inputs.mask.slopes
        if slopes is not None:
            scores += slopes[None, :, None, None] * distance[:, None]
        weights = masked_softmax(scores, visible[:, None]).reshape(
            B, self.kv_heads, -1, T, seen.keys.shape[1]
        )
        y = jnp.einsum("bkgts,bskh->btkgh", weights, seen.values.astype(jnp.float32))
        return y.reshape(B, T, N, H)

    def _rotated(self, x: Array, positions: Array, inputs: Inputs) -> Array:
        tables = inputs.position.tables(positions, self.head_size)
        return inputs.position.rotate(x, tables)

    def _scores(self, q: Array, k: Array) -> Array:
        """[B, T, N, H] and [B, S, K, H] -> [B, N, T, S] float32."""
        B, T, N, H = q.shape
        q = q.reshape(B, T, self.kv_heads, -1, H)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        scale = H**-0.5 if self.scale is None else self.scale
        return scores.reshape(B, N, T, -1) * scale

    def empty_cache(self, batch: int, length: int | None, dtype: Any) -> RollingCache:
        """Of sinks + window slots, whatever the length; ValueError without a window, and for a storage
        in few bits: keys are kept before rotation here."""
        require_plain(self.storage, "StreamingAttention")
        if self.window is None:
            raise ValueError("StreamingAttention has no window: its cache would have no size")
        slots = self.sinks + self.window
        shape = (batch, slots, self.kv_heads, self.head_size)
        zeros = jnp.zeros((batch, slots), jnp.int32)
        return RollingCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zeros, zeros)


def roll(cache: RollingCache, new: RollingCache, window: int, sinks: int) -> RollingCache:
    """The cache after T new tokens: sink k in slot k, another in sinks + (k - sinks) mod window.

    Padding is not written, nor is what the window has left behind before the last new token.
    """
    at, real = new.positions, new.segments != 0
    end = jnp.max(jnp.where(real, at, -1), axis=1, keepdims=True)
    kept = real & ((at < sinks) | (at > end - window))
    slot = jnp.where(at < sinks, at, sinks + (at - sinks) % window)
    slot = jnp.where(kept, slot, sinks + window)  # out of bounds: dropped
    rows = jnp.arange(at.shape[0])[:, None]

    def put(old: Array, values: Array) -> Array:
        return old.at[rows, slot].set(values.astype(old.dtype), mode="drop")

    return RollingCache(
        put(cache.keys, new.keys),
        put(cache.values, new.values),
        put(cache.positions, at),
        put(cache.segments, new.segments),
    )


def streaming(config: DecoderConfig, window: int, sinks: int = 4) -> DecoderConfig:
    """The same model, its parameters too, with StreamingAttention in every layer.

    The paper's finding is that four sinks are enough. ValueError for a layer that is not plain
    Attention, or whose own window is smaller.
    """
    if window < 1 or sinks < 0:
        raise ValueError(f"a window of {window} with {sinks} sinks; expected >= 1 and >= 0")

    def of(block: Any) -> Any:
        old = block.attention
        if type(old) is not Attention or (old.window or window) < window:
            what = f"{type(old).__name__} of window {getattr(old, 'window', None)}"
            raise ValueError(f"streaming with window {window} does not replace {what}")
        fields = {f.name: getattr(old, f.name) for f in dataclasses.fields(Attention)}
        kept = {name: value for name, value in fields.items() if name not in ("parent", "name")}
        return block.clone(attention=StreamingAttention(**kept | {"window": window}, sinks=sinks))

    stacks = tuple(
        dataclasses.replace(stack, pattern=tuple(map(of, stack.pattern))) for stack in config.stacks
    )
    return dataclasses.replace(config, stacks=stacks)
