"""The one decoder trunk: every family is a DecoderConfig of parts.

The trunk is a tuple of stacks (count, pattern): `pattern` is a short cycle of blocks, repeated
`count` times, its parameters stacked on a leading layer axis. A stack is run by `lax.scan` over
pure `block.apply`, so that compile time does not grow with depth, or by a Python loop over the
same parameters (`scan=False`), in which intermediate values can be printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.kernels.attend import Attend, reference
from research.kernels.mask import Mask
from research.kernels.select import attend_auto
from research.models.attention import Attention, Cache, Inputs, LayerCache
from research.models.layers import Embedding, RMSNorm
from research.models.position import NoPosition, Rope
from research.types import Array, Params
from research.weights.base import is_weight

Residual = Callable[[nn.Module, Callable[[Array], Array], Array], Array]


def pre_norm(norm: nn.Module, sublayer: Callable[[Array], Array], x: Array) -> Array:
    """x + f(norm(x)), GPT-2 and everything since (Xiong et al. 2020, arXiv:2002.04745)."""
    return x + sublayer(norm(x))


def post_norm(norm: nn.Module, sublayer: Callable[[Array], Array], x: Array) -> Array:
    """norm(x + f(x)), the 2017 Transformer and GPT-1."""
    return norm(x + sublayer(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each in its residual connection."""

    attention: Attention
    ffn: nn.Module
    norm: nn.Module = RMSNorm()
    residual: Residual = pre_norm

    @nn.compact
    def __call__(
        self, x: Array, inputs: Inputs, cache: LayerCache | None = None
    ) -> tuple[Array, LayerCache | None]:
        def attend(normed: Array) -> Array:
            nonlocal cache
            y, cache = self.attention(normed, inputs, cache)
            return y

        x = self.residual(self.norm.copy(name="attention_norm"), attend, x)
        x = self.residual(self.norm.copy(name="ffn_norm"), self.ffn, x)
        return x, cache


@dataclasses.dataclass(frozen=True)
class Stack:
    """`pattern` repeated `count` times."""

    count: int
    pattern: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A family's parts. `head` None means tied to the embedding table.

    init_std is the embedding table's; each Linear has its own `kernel_init`.
    """

    vocab_size: int
    width: int
    stacks: tuple[Stack, ...]
    max_length: int
    position: NoPosition = Rope()
    final_norm: nn.Module | None = RMSNorm()
    head: nn.Module | None = None
    dtype: Any = jnp.float32
    attend: Attend = attend_auto
    scan: bool = True
    remat: Callable[..., bool] | str | None = None  # None, "full", or a jax.checkpoint policy
    init_std: float = 0.02

    @property
    def layers(self) -> int:
        return sum(stack.count * len(stack.pattern) for stack in self.stacks)


class Decoder(nn.Module):
    """tokens [B, T] -> logits [B, T, V] float32; with a cache, (logits, cache)."""

    config: DecoderConfig

    def setup(self):
        config = self.config
        self.embed = Embedding(config.vocab_size, config.width, config.init_std)
        self.final_norm = None if config.final_norm is None else config.final_norm.copy()
        self.head = None if config.head is None else config.head.copy()
        for number, stack in enumerate(config.stacks):
            if self.is_initializing():
                self.param(f"stack_{number}", init_stack, stack, config)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        states = self.hidden(tokens, positions, segment_ids, mask, cache)
        if cache is None:
            return self.project(states)
        states, cache = states
        return self.project(states), cache

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """The states [B, T, D] that the head multiplies, for losses fused with the head."""
        config = self.config
        mask, positions, past = arrange(tokens, positions, segment_ids, mask or Mask(), cache)
        tables = config.position.tables(positions, head_size(config))
        inputs = Inputs(tables, mask, config.position, config.attend)
        x = self.embed(tokens).astype(config.dtype)
        layers = []
        for number, stack in enumerate(config.stacks):
            params = self.get_variable("params", f"stack_{number}")
            layer_cache = None if past is None else past.layers[number]
            rng = self.make_rng("dropout") if self.has_rng("dropout") else None
            x, layer_cache = run_stack(config, stack, params, x, inputs, layer_cache, rng)
            layers.append(layer_cache)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if past is None else (x, past.replace(layers=tuple(layers)))

    def project(self, states: Array) -> Array:
        """States [..., D] -> logits [..., V] float32: the head alone."""
        logits = self.embed.attend(states) if self.head is None else self.head(states)
        return logits.astype(jnp.float32)


def head_size(config: DecoderConfig) -> int:
    """That of every block: they share the tables of positions."""
    blocks = [block for stack in config.stacks for block in stack.pattern]
    sizes = {block.attention.head_size for block in blocks}
    if len(sizes) != 1:
        raise ValueError(f"blocks of one model share a head size, these have {sorted(sizes)}")
    return sizes.pop()


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
        return mask, positions, None
    require_room(cache, T)
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    real = (segment_ids != 0).astype(jnp.int32)
    if positions is None:
        positions = jnp.maximum(cache.lengths[:, None] + jnp.cumsum(real, axis=1) - 1, 0)
    keys = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.index))
    mask = mask.replace(offset=cache.index, query_segments=segment_ids, key_segments=keys)
    taken = cache.replace(
        segment_ids=keys, index=cache.index + T, lengths=cache.lengths + real.sum(axis=1)
    )
    return mask, positions, taken


def require_room(cache: Cache, T: int) -> None:
    """ValueError when T more tokens do not fit, where the index is known (outside jit)."""
    slots = cache.segment_ids.shape[1]
    if not isinstance(cache.index, jax.core.Tracer) and int(cache.index) + T > slots:
        raise ValueError(f"the cache holds {int(cache.index)} of {slots} tokens, no room for {T}")


def run_stack(
    config: DecoderConfig,
    stack: Stack,
    params: Any,
    x: Array,
    inputs: Inputs,
    cache: Any,
    rng: Array | None,
) -> tuple[Array, Any]:
    """x through all layers of one stack. `params` is stacked, or a tuple of one tree per layer."""
    held = len(params) if isinstance(params, tuple) else jax.tree.leaves(params)[0].shape[0]
    if held != stack.count:
        raise ValueError(f"a stack of {stack.count} layers was given the parameters of {held}")

    def cycle(x: Array, params: Params, cache: Any, index: Array | int) -> tuple[Array, Any]:
        new = {}
        for number, block in enumerate(stack.pattern):
            name = f"block_{number}"
            key = (
                None
                if rng is None
                else jax.random.fold_in(rng, index * len(stack.pattern) + number)
            )
            x, new[name] = block.apply(
                {"params": params[name]},
                x,
                inputs,
                None if cache is None else cache[name],
                rngs=None if key is None else {"dropout": key},
            )
        return x, (None if cache is None else new)

    if config.remat is not None:
        policy = None if config.remat == "full" else config.remat
        cycle = jax.checkpoint(cycle, policy=policy, prevent_cse=not config.scan)
    if isinstance(params, tuple) or not config.scan:
        return loop_layers(cycle, params, x, cache, stack.count)
    return scan_layers(cycle, params, x, cache, stack.count)


def loop_layers(cycle, params: Any, x: Array, cache: Any, count: int) -> tuple[Array, Any]:
    """Layer after layer in Python."""
    caches = []
    for index in range(count):
        x, new = cycle(x, layer(params, index), layer(cache, index), index)
        caches.append(new)
    if cache is None or isinstance(cache, tuple):
        return x, (None if cache is None else tuple(caches))
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def scan_layers(cycle, params: Params, x: Array, cache: Any, count: int) -> tuple[Array, Any]:
    """lax.scan over the layer axis.

    The cache rides in the carry and is updated in place: as scanned input and output XLA would
    copy the whole of it in every call.
    """

    def body(carry, scanned):
        x, cache = carry
        params, index = scanned
        x, new = cycle(x, params, layer(cache, index), index)
        put = jax.lax.dynamic_update_index_in_dim
        cache = jax.tree.map(lambda whole, part: put(whole, part, index, 0), cache, new)
        return (x, cache), None

    (x, cache), _ = jax.lax.scan(body, (x, cache), (params, jnp.arange(count)))
    return x, cache


def layer(stacked: Any, index: Array | int) -> Any:
    """One layer of a stacked tree, or of a tuple of layers; None stays None."""
    if stacked is None or isinstance(stacked, tuple):
        return None if stacked is None else stacked[index]
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def init_stack(rng: Array, stack: Stack, config: DecoderConfig) -> Params:
    """Boxed parameters {block_0: ...} with a leading axis of `stack.count` layers."""
    x = jnp.zeros((1, 1, config.width), config.dtype)
    tables = config.position.tables(jnp.zeros((1, 1), jnp.int32), head_size(config))
    inputs = Inputs(tables, Mask(), config.position, reference)

    def init_cycle(key: Array) -> Params:
        keys = jax.random.split(key, len(stack.pattern))
        return {
            f"block_{number}": block.init(keys[number], x, inputs)["params"]
            for number, block in enumerate(stack.pattern)
        }

    boxed = jax.vmap(init_cycle)(jax.random.split(rng, stack.count))
    return jax.tree.map(
        lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}),
        boxed,
        is_leaf=nn.meta.is_axis_metadata,
    )


def init(model: Decoder, rng: Array) -> Params:
    """Fresh parameters: a nested dict of float32 arrays."""
    return nn.meta.unbox(model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"])


def axes(model: Decoder) -> Params:
    """The tree of `init`, each leaf a tuple of logical axis names. Nothing is allocated."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=nn.meta.is_axis_metadata)


def count_parameters(model: Decoder) -> int:
    """Exact, from the shapes of `init`. Nothing is allocated."""
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def unstack(
    tree: Params, change: Callable[[Any], Any] = lambda w: w, donate: bool = False
) -> Params:
    """Every stack_* entry as a tuple of one tree per layer: what decoding on a CPU wants.

    A scanned stack reads each layer's matrices through a copy; separate arrays are read in place.
    `change` is applied to each layer's matrices and Weights. With `donate` the stacked arrays are
    deleted one after another, so that no second copy of the parameters ever exists.
    """
    return {
        name: split_layers(value, change, donate) if name.startswith("stack_") else value
        for name, value in tree.items()
    }


def split_layers(stacked: Params, change: Callable[[Any], Any], donate: bool) -> tuple[Params, ...]:
    """A stacked tree [L, ...] as L trees."""

    def split(node: Any) -> list:
        count = jax.tree.leaves(node)[0].shape[0]
        layers = jax.block_until_ready([change(layer(node, index)) for index in range(count)])
        if donate:
            jax.tree.map(lambda leaf: leaf.delete(), node)
        return layers

    nodes, tree = jax.tree.flatten(stacked, is_leaf=is_weight)
    return tuple(map(tree.unflatten, zip(*map(split, nodes), strict=True)))


def empty_cache(
    model: Decoder, batch: int, length: int, dtype: Any = None, stacked: bool = True
) -> Cache:
    """A cache of `length` slots. `stacked=False` goes with unstacked parameters."""
    config = model.config
    dtype = config.dtype if dtype is None else dtype

    def of(stack: Stack) -> Any:
        one = {
            f"block_{number}": block.attention.empty_cache(batch, length, dtype)
            for number, block in enumerate(stack.pattern)
        }
        if not stacked:
            return tuple(jax.tree.map(jnp.copy, one) for _ in range(stack.count))
        return jax.tree.map(lambda a: jnp.zeros((stack.count, *a.shape), a.dtype), one)

    return Cache(
        layers=tuple(of(stack) for stack in config.stacks),
        segment_ids=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
    )
