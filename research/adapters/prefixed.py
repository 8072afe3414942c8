"""The model whose rows begin with a prefix: a Decoder's interface over a cache that holds more.

The prefix stands in the first slots of every layer's cache, and rows are read after it. What comes
back tells of the text alone, its slots counted from 0, so that whoever decodes sees no prefix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from research.kernels.mask import Mask
from research.models.attention import Cache, LayerCache, require_plain
from research.models.decoder import Decoder, DecoderConfig, empty_cache
from research.models.layers import dropout
from research.models.stack import Stack, layers_of
from research.types import Array, Params


class Prefixed(Decoder):
    """A Decoder whose every row begins with the prefix of `length` in its parameters.

    Interface and results are the Decoder's, of the text alone; so is a cache, which `start` begins:
    its layers have `length` slots more than it tells of. `dropout` is the rate of the prefix's keys
    and values in training (0.1 in ChatGLM). ValueError for rows of several segments where they are
    known (outside jit; nan under jit) and for a cache that another model began.
    """

    length: int
    moves: bool = True
    dropout: float = 0.0

    beside = (*Decoder.beside, "prefix")

    @property
    def before(self) -> int:
        return self.length

    def start(
        self, batch: int, length: int | None, dtype: Any = None, stacked: bool = True
    ) -> Cache:
        slots = None if length is None else self.length + length
        cache = empty_cache(self, batch, slots, dtype, stacked)
        parts, first, layers = self._parts(batch), 0, []
        for stack, held in zip(self.config.stacks, cache.layers, strict=True):
            last = first + stack.count * len(stack.pattern)
            layers.append(filled(held, parts[first:last], stack))
            first = last
        segment_ids = cache.segment_ids[:, self.length :]
        return cache.replace(layers=tuple(layers), segment_ids=segment_ids)

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        B, T = tokens.shape
        alone = one_segment(segment_ids)
        plain = positions is None and segment_ids is None  # else some may be padding
        whole = self._whole(self._begun(B, T, plain) if cache is None else cache)
        states, whole = super().hidden(
            tokens, self._moved(positions), segment_ids, self._opened(mask, B), whole
        )
        if alone is not None:
            states = jnp.where(alone[:, None, None], states, jnp.nan)
        return states if cache is None else (states, self._text(whole))

    def _parts(self, batch: int) -> Array:
        """[L, 2, B, P, K, H], keys and values of every layer."""
        if not self.has_variable("params", "prefix"):
            raise ValueError("the parameters have no prefix: prefix.add puts one there")
        table, (K, H) = flat(self.get_variable("params", "prefix")), sizes(self.config)
        if table.shape != (self.length, 2 * self.config.layers * K * H):
            raise ValueError(
                f"the prefix is {table.shape}, expected [{self.length}, 2 * {self.config.layers} "
                f"layers * {K} heads * {H}]"
            )
        parts = table.reshape(self.length, self.config.layers, 2, 1, K, H)
        parts = jnp.moveaxis(parts, 0, 3)
        parts = jnp.broadcast_to(parts, (*parts.shape[:2], batch, *parts.shape[3:]))
        return dropout(self, parts, self.dropout)

    def _begun(self, B: int, T: int, plain: bool) -> Cache:
        """The cache of rows that are read at once; its index is a Python int, as kernels like it.

        ValueError when `plain` tokens, all of them real, need more positions than there are.
        """
        most, P = self.config.position.most, self.length * self.moves
        if plain and most is not None and most < P + T:
            raise ValueError(f"a prefix of {P} and {T} tokens are more than {most} positions")
        params = self.variables["params"]
        stacked = not any(isinstance(node, tuple) for node in params.values())
        return self.start(B, T, stacked=stacked).replace(index=0)

    def _whole(self, cache: Cache) -> Cache:
        """A cache of the text as the trunk needs it: of prefix and text."""
        (B, S), P = cache.segment_ids.shape, self.length
        slots = jax.tree.leaves(cache.layers)[0].shape[-3]
        if slots != P + S:
            raise ValueError(
                f"the cache's layers have {slots} slots for {S} tokens and a prefix of {P}: begin "
                'it with `start` (model.apply(..., method="start"))'
            )
        ones = jnp.ones((B, P), cache.segment_ids.dtype)
        return cache.replace(
            segment_ids=jnp.concatenate([ones, cache.segment_ids], axis=1),
            index=cache.index + P,
            lengths=cache.lengths + P * self.moves,
        )

    def _text(self, whole: Cache) -> Cache:
        """The inverse of `_whole`."""
        return whole.replace(
            segment_ids=whole.segment_ids[:, self.length :],
            index=whole.index - self.length,
            lengths=whole.lengths - self.length * self.moves,
        )

    def _moved(self, positions: Array | None) -> Array | None:
        """Positions given from outside, [B, T] or [B, T, 2], of which the first moves."""
        if positions is None or not self.moves:
            return positions
        return positions + jnp.array((self.length, 0)[: positions.ndim - 1])

    def _opened(self, mask: Mask | None, batch: int) -> Mask:
        """The mask with the prefix in every window, and columns counted from the prefix on."""
        mask = mask or Mask()
        if mask.prefix is not None:
            return mask.replace(prefix=mask.prefix + self.length)
        windows = [block.attention.window for *_, block in layers_of(self.config.stacks)]
        # A scheme that reads the tokens opens the columns itself, the prefix's among them.
        if not any([*windows, mask.window]) or self.config.position.context(1) is not None:
            return mask
        return mask.replace(prefix=jnp.full(batch, self.length, jnp.int32))


def filled(held: Any, parts: Array, stack: Stack) -> Any:
    """A stack's empty layers, stacked or apart, with the prefix [layers, 2, B, P, K, H] in them."""
    step = len(stack.pattern)

    def put(empty: LayerCache, keys: Array, values: Array) -> LayerCache:
        P = keys.shape[-3]
        return LayerCache(
            empty.keys.at[..., :P, :, :].set(keys.astype(empty.keys.dtype)),
            empty.values.at[..., :P, :, :].set(values.astype(empty.values.dtype)),
        )

    def cycle(layers: Any, own: Array) -> Any:
        """own [step, 2, ...], or [step, 2, count, ...]."""
        return {f"block_{n}": put(layers[f"block_{n}"], *own[n]) for n in range(step)}

    cycles = parts.reshape(stack.count, step, *parts.shape[1:])
    if isinstance(held, tuple):
        return tuple(map(cycle, held, cycles))
    return cycle(held, jnp.moveaxis(cycles, 0, 2))


def one_segment(segment_ids: Array | None) -> Array | None:
    """[B] which rows hold one example, segment 1; ValueError for one that does not, where it is
    known."""
    if segment_ids is None:
        return None
    alone = (jnp.asarray(segment_ids) <= 1).all(axis=1)
    if not isinstance(alone, jax.core.Tracer) and not alone.all():
        row = int(jnp.argmin(alone))
        raise ValueError(
            f"row {row} is packed of several segments, and a prefix begins one: pad the batch"
        )
    return alone


def flat(prefix: Params) -> Array:
    """[P, 2 L K H] of the `prefix` subtree, through the MLP where it has one."""
    if "hidden" not in prefix:
        return prefix["table"]
    x = jnp.tanh(prefix["table"] @ prefix["hidden"]["kernel"] + prefix["hidden"]["bias"])
    return x @ prefix["out"]["kernel"] + prefix["out"]["bias"]


def sizes(config: DecoderConfig) -> tuple[int, int]:
    """(K, H), key/value heads and their size, that all layers share.

    ValueError naming a layer whose cache has no slot for every token or is in few bits, layers that
    differ, and a position scheme that biases the scores.
    """
    found = {}
    for path, *_, block in layers_of(config.stacks):
        attention = block.attention
        if config.position.slopes(attention.heads) is not None:
            raise ValueError(
                f"{type(config.position).__name__} measures distance in slots, from which a prefix "
                "would be as far as a row's padding is long: it takes no prefix"
            )
        try:
            held = jax.eval_shape(lambda: attention.empty_cache(1, 1, jnp.float32))  # noqa: B023
        except TypeError:
            held = None
        if not isinstance(held, LayerCache):
            raise ValueError(
                f"{path}: {type(attention).__name__} does not keep a key for every token, and takes "
                "no prefix"
            )
        # A prefix trains through the cache, and rounding has no gradient.
        require_plain(attention.storage, f"a prefix before {path}")
        found[path] = held.keys.shape[2:]
    if len(set(found.values())) != 1:
        raise ValueError(f"layers differ in key/value heads and their size: {found}")
    return next(iter(found.values()))
