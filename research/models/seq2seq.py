"""The encoder–decoder Transformer (Vaswani et al. 2017, arXiv:1706.03762), of the decoder's parts.

The encoder is a trunk of the same blocks as a decoder's, with a mask that is not causal; a layer of
the decoder is a CrossBlock. Source and target share one embedding table, which is multiplied by
sqrt(D) where it is read, and the output is tied to it.

    embed/table                                           [V, D]
    {encoder,decoder}/stack_0/block_0/{attention,...}     as a decoder's, see docs/DESIGN.md
    decoder/stack_0/block_0/{cross,cross_norm}/...        attention to the source
    {encoder,decoder}/final_norm                          where the config has one
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from research.kernels.attend import Attend
from research.kernels.mask import Mask
from research.kernels.select import attend_auto
from research.models import decoder
from research.models.additive import Sinusoidal
from research.models.arrange import arrange, require_positions
from research.models.attention import Cache, Inputs
from research.models.cross import CrossInputs, CrossLayerCache, cross_mask
from research.models.init import Rules, begin
from research.models.layers import Embedding, dropout
from research.models.position import NoPosition
from research.models.stack import Remat, Stack, init_stack, per_layer, run_stack
from research.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
    """The parts, as in DecoderConfig. The blocks of `decoder` are CrossBlocks; `final_norm` follows
    each of the two trunks."""

    vocab_size: int
    width: int
    encoder: tuple[Stack, ...]
    decoder: tuple[Stack, ...]
    max_length: int
    position: NoPosition = Sinusoidal()
    final_norm: nn.Module | None = None
    head: nn.Module | None = None
    dtype: Any = jnp.float32
    attend: Attend = attend_auto
    scan: bool = True
    remat: Remat = None
    init_std: float = 0.02
    init_rules: Rules = ()
    dropout: float = 0.0

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return self.encoder + self.decoder


@struct.dataclass
class Seq2SeqCache(Cache):
    """A Cache of CrossLayerCaches; and which of the source's tokens are real, [B, S]."""

    source_segment_ids: Array


class Trunk(nn.Module):
    """x [B, T, D] through stacks of layers and, where there is one, a norm."""

    config: Seq2SeqConfig
    stacks: tuple[Stack, ...]

    @nn.compact
    def __call__(self, x: Array, inputs: Any, caches: Any = None) -> tuple[Array, Any]:
        config, new = self.config, []
        for number, stack in enumerate(self.stacks):
            if self.is_initializing():
                self.param(f"stack_{number}", init_stack, stack, x, inputs)
            params = self.get_variable("params", f"stack_{number}")
            cache = None if caches is None else caches[number]
            rng = self.make_rng("dropout") if self.has_rng("dropout") else None
            x, cache = run_stack(stack, params, x, inputs, cache, rng, config.scan, config.remat)
            new.append(cache)
        if config.final_norm is not None:
            x = config.final_norm.copy(name="final_norm")(x)
        return x, tuple(new)


class Seq2Seq(nn.Module):
    """source [B, S], tokens [B, T] -> logits [B, T, V] float32 for what follows each of `tokens`.

    A token of the target sees the source's tokens of its own segment id: those of 0 are padding,
    and where no ids are given all are 1. With a cache the result is (logits, cache); the call that
    has a source reads it into the cache, and for later ones `source` is None.
    """

    config: Seq2SeqConfig

    def setup(self):
        config = self.config
        self.embed = Embedding(config.vocab_size, config.width, config.init_std)
        self.position = config.position.embedding(config.width)
        self.encoder = Trunk(config, config.encoder)
        self.decoder = Trunk(config, config.decoder)
        self.head = None if config.head is None else config.head.copy()

    def __call__(
        self,
        source: Array | None,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        source_positions: Array | None = None,
        source_segment_ids: Array | None = None,
        cache: Seq2SeqCache | None = None,
    ) -> Array | tuple[Array, Seq2SeqCache]:
        states = self.hidden(
            source, tokens, positions, segment_ids, source_positions, source_segment_ids, cache
        )
        if cache is None:
            return self.project(states)
        states, cache = states
        return self.project(states), cache

    def encode(
        self, source: Array, positions: Array | None = None, segment_ids: Array | None = None
    ) -> Array:
        """The states [B, S, D] of a source, whose tokens see all of their segment."""
        both_ways = Mask(causal=False)
        mask, positions, _ = arrange(source, positions, segment_ids, both_ways, None)
        x = self._embedded(source, positions, segment_ids)
        return self.encoder(x, self._inputs(positions, mask))[0]

    def hidden(
        self,
        source: Array | None,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        source_positions: Array | None = None,
        source_segment_ids: Array | None = None,
        cache: Seq2SeqCache | None = None,
    ) -> Array | tuple[Array, Seq2SeqCache]:
        """The states [B, T, D] of the target that the head multiplies."""
        if source is not None:
            memory = self.encode(source, source_positions, source_segment_ids)
            cache = None if cache is None else about(cache, source, source_segment_ids)
        elif cache is None:
            raise ValueError("source is None, and there is no cache that has read one")
        else:
            memory, source_segment_ids = None, cache.source_segment_ids
        across = cross_mask(segment_ids, source_segment_ids, tokens, source)
        cross = Inputs(None, across, NoPosition(), self.config.attend)
        mask, positions, past = arrange(tokens, positions, segment_ids, Mask(), cache)
        inputs = CrossInputs(self._inputs(positions, mask), cross, memory)
        x = self._embedded(tokens, positions, segment_ids)
        x, layers = self.decoder(x, inputs, None if past is None else past.layers)
        return x if past is None else (x, past.replace(layers=layers))

    def project(self, states: Array) -> Array:
        """States [..., D] -> logits [..., V] float32: the head alone."""
        logits = self.embed.attend(states) if self.head is None else self.head(states)
        return logits.astype(jnp.float32)

    def _embedded(self, tokens: Array, positions: Array, segment_ids: Array | None) -> Array:
        config = self.config
        x = (self.embed(tokens) * config.width**0.5).astype(config.dtype)
        if self.position is not None:
            at = positions if segment_ids is None else jnp.where(segment_ids == 0, 0, positions)
            require_positions(config.position.most, at)
            x += self.position(at).astype(x.dtype)
        return dropout(self, x, config.dropout)

    def _inputs(self, positions: Array, mask: Mask) -> Inputs:
        config = self.config
        tables = config.position.tables(positions, decoder.head_size(config))
        return Inputs(tables, mask, config.position, config.attend)


def about(cache: Seq2SeqCache, source: Array, segment_ids: Array | None) -> Seq2SeqCache:
    """The cache, knowing which tokens of `source` are real; ValueError when it has other room."""
    room = cache.source_segment_ids.shape
    if room != source.shape:
        raise ValueError(f"the cache is for a source of shape {room}, this one has {source.shape}")
    ids = jnp.ones(room, jnp.int32) if segment_ids is None else segment_ids
    return cache.replace(source_segment_ids=ids)


def empty_cache(
    model: Seq2Seq, batch: int, length: int, source_length: int, stacked: bool = True
) -> Seq2SeqCache:
    """Room for `length` tokens of the target and exactly `source_length` of the source.

    `stacked=False` goes with unstacked parameters.
    """

    def of(stack: Stack) -> Any:
        one = {
            f"block_{number}": CrossLayerCache(
                block.attention.empty_cache(batch, length, model.config.dtype),
                block.cross.empty_cache(batch, source_length, model.config.dtype),
            )
            for number, block in enumerate(stack.pattern)
        }
        return per_layer(one, stack.count, stacked)

    return Seq2SeqCache(
        layers=tuple(of(stack) for stack in model.config.decoder),
        segment_ids=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        source_segment_ids=jnp.zeros((batch, source_length), jnp.int32),
    )


def init(model: Seq2Seq, rng: Array) -> Params:
    """Fresh parameters: a nested dict of float32 arrays."""
    params = nn.meta.unbox(_boxed(model, rng))
    return begin(params, model.config.init_rules, rng)


def axes(model: Seq2Seq) -> Params:
    """The tree of `init`, each leaf a tuple of logical axis names. Nothing is allocated."""
    boxed = jax.eval_shape(lambda: _boxed(model, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=nn.meta.is_axis_metadata)


def count_parameters(model: Seq2Seq) -> int:
    """Exact, from the shapes of `init`. Nothing is allocated."""
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _boxed(model: Seq2Seq, rng: Array) -> Params:
    one = jnp.zeros((1, 1), jnp.int32)
    return model.init(rng, one, one)["params"]


def unstack(params: Params, **how: Any) -> Params:
    """`decoder.unstack` of the decoder, whose layers decoding reads again and again."""
    return {**params, "decoder": decoder.unstack(params["decoder"], **how)}


def encoder_only(config: Seq2SeqConfig, params: Params) -> tuple[decoder.DecoderConfig, Params]:
    """The encoder as a model of its own: Decoder(config).apply(..., mask=Mask(causal=False)).

    As `hidden` it gives the states of `Seq2Seq.encode`.
    """
    shared = ("vocab_size", "width", "max_length", "position", "final_norm", "head", "dtype")
    shared += ("attend", "scan", "remat", "init_std", "dropout")
    parts = {name: getattr(config, name) for name in shared}
    scale = config.width**0.5
    alone = decoder.DecoderConfig(stacks=config.encoder, embed_scale=scale, **parts)
    return alone, {"embed": params["embed"], **params["encoder"]}
