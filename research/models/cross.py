"""A layer of a decoder that has a source: attention to the encoder's states between the two sublayers
of a Block (Vaswani et al. 2017, arXiv:1706.03762, section 3.1).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from research.kernels.mask import Mask
from research.models.attention import Attention, Inputs, LayerCache
from research.models.block import Residual, post_norm
from research.models.layers import LayerNorm, dropout
from research.types import Array


@struct.dataclass
class CrossInputs:
    """What every layer of a decoder with a source shares. `memory` [B, S, D] are the states of the
    encoder; None when the cache holds the keys and values that were made of them."""

    own: Inputs
    cross: Inputs
    memory: Array | None


@struct.dataclass
class CrossLayerCache:
    """One layer's keys and values: of the target so far, and of the whole source."""

    own: LayerCache
    memory: LayerCache


class CrossBlock(nn.Module):
    """One layer of the decoder: self-attention, attention to the source, feed-forward."""

    attention: Attention
    cross: Attention
    ffn: nn.Module
    norm: nn.Module = LayerNorm()
    residual: Residual = post_norm
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, inputs: CrossInputs, cache: CrossLayerCache | None = None
    ) -> tuple[Array, CrossLayerCache | None]:
        own = None if cache is None else cache.own
        memory = cache.memory if inputs.memory is None else inputs.memory

        def attend(normed: Array) -> Array:
            nonlocal own
            y, own = self.attention(normed, inputs.own, own)
            return dropout(self, y, self.dropout)

        def look(normed: Array) -> Array:
            nonlocal memory
            y, memory = self.cross(normed, inputs.cross, memory=memory)
            return dropout(self, y, self.dropout)

        def feed(normed: Array) -> Array:
            return dropout(self, self.ffn(normed), self.dropout)

        x = self.residual(self.norm.copy(name="attention_norm"), attend, x)
        x = self.residual(self.norm.copy(name="cross_norm"), look, x)
        x = self.residual(self.norm.copy(name="ffn_norm"), feed, x)
        return x, (None if cache is None else CrossLayerCache(own, memory))


def cross_mask(
    segment_ids: Array | None,
    source_segment_ids: Array | None,
    tokens: Array,
    source: Array | None,
) -> Mask:
    """Who of `tokens` [B, T] sees whom of `source` [B, S]: equal segments, 1 where none are given."""
    if segment_ids is None and source_segment_ids is None:
        return Mask(causal=False)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    if source_segment_ids is None:
        source_segment_ids = jnp.ones(source.shape, jnp.int32)
    return Mask(causal=False, query_segments=segment_ids, key_segments=source_segment_ids)
