"""Multi-head, grouped-query and multi-query attention, and the key/value cache.

Vaswani et al. 2017 (arXiv:1706.03762); kv_heads = heads is multi-head, 1 multi-query (Shazeer
2019, arXiv:1911.02150), between them grouped-query attention (Ainslie et al. 2023,
arXiv:2305.13245). The cache is an ordinary argument and result.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from research.kernels.attend import Attend, require
from research.kernels.mask import Mask
from research.models.layers import Linear
from research.models.position import NoPosition, Tables
from research.models.storage import Kept, Storage, empty, get, put
from research.types import Array


@struct.dataclass
class Inputs:
    """What every layer of one forward pass shares."""

    tables: Tables
    mask: Mask
    position: NoPosition = struct.field(pytree_node=False)
    attend: Attend = struct.field(pytree_node=False)
    positions: Array | None = None  # [1 or B, T], of the tokens in their rows


@struct.dataclass
class LayerCache:
    """One layer's keys and values [B, S, K, H], as they are or in few bits; stacked layers carry a
    leading axis L."""

    keys: Kept
    values: Kept


@struct.dataclass
class Cache:
    """The past of a batch: slots 0..index-1 are filled, in order, for every row.

    layers       as the parameters are: per stack and block, stacked or one per layer
    segment_ids  [B, S] of the filled slots; 0 is padding or not yet filled. New tokens are of
                 segment 1 unless they say otherwise, so that is what a row's past should be
                 (None: no layer keeps a slot for every token, and the cache has no end)
    index        int32 scalar, the next free slot; who writes past the last one under jit, where it
                 cannot be checked, overwrites the last
    lengths      [B] int32, real tokens so far: the position of the next one
    context      what the position scheme remembers of what it read, see `NoPosition.place`
    """

    layers: tuple
    segment_ids: Array | None
    index: Array
    lengths: Array
    context: Any = struct.field(default=None, kw_only=True)


def write(cache: LayerCache, keys: Array, values: Array, index: Array) -> LayerCache:
    """The cache with [B, T, K, H] new keys and values at slots index..index+T-1."""
    return LayerCache(put(cache.keys, keys, index), put(cache.values, values, index))


def read(cache: LayerCache, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Its keys and values [B, S, K, H]."""
    return get(cache.keys, dtype), get(cache.values, dtype)


class Attention(nn.Module):
    """x [B, T, D] -> [B, T, D].

    bias: on q, k and v; out_bias: on the output projection. window: keys each query sees, itself
    included (None: all). scale: of q·k, 1/sqrt(H) when None. softcap: c, which bends scaled scores x
    to c·tanh(x/c) (Gemma 2). dropout: of the attention probabilities, in training. ValueError for
    either with a kernel that has none. storage: how the cache keeps keys and values.

    Keys and values are made of x, or in cross-attention of `memory` [B, S, D]; then they come back
    in the place of the cache, and `memory` may be what came back before. ValueError then for a
    storage in few bits, which only a cache that is written slot by slot has.
    """

    heads: int
    kv_heads: int
    head_size: int
    bias: bool = False
    out_bias: bool = False
    window: int | None = None
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    storage: Storage = Storage()

    @nn.compact
    def __call__(
        self,
        x: Array,
        inputs: Inputs,
        cache: LayerCache | None = None,
        memory: Array | LayerCache | None = None,
    ) -> tuple[Array, LayerCache | None]:
        if memory is not None:
            require_plain(self.storage, "cross-attention")
        B, T, D = x.shape
        q = self._heads("q", self.heads, "heads")(x).reshape(B, T, self.heads, self.head_size)
        q = inputs.position.rotate(q, inputs.tables)
        if isinstance(memory, LayerCache):
            k, v = read(memory, q.dtype)
        else:
            k, v = self._keys_values(x if memory is None else memory)
            k = inputs.position.rotate(k, inputs.tables)
        mask, slopes = inputs.mask, inputs.position.slopes(self.heads)
        if slopes is not None:
            mask = mask.replace(slopes=slopes)
        if self.window is not None:
            mask = mask.replace(window=self.window)
        if memory is not None:
            cache = LayerCache(k, v)
        elif cache is not None:
            cache = write(cache, k, v, mask.offset)
            k, v = read(cache, q.dtype)
        y = self._attend(inputs.attend, q, k, v, mask).reshape(B, T, -1)
        return Linear(D, ("heads", "embed"), self.out_bias, name="o")(y), cache

    def _attend(self, attend: Attend, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        more: dict[str, Any] = {}
        if self.softcap is not None:
            more["softcap"] = self.softcap
        if self.dropout > 0 and self.has_rng("dropout"):
            more["dropout"] = (self.dropout, self.make_rng("dropout"))
        for argument in more:
            require(attend, argument)
        return attend(q, k, v, mask, self.scale, **more)

    def _keys_values(self, x: Array) -> tuple[Array, Array]:
        """[B, S, K, H] each."""
        k, v = (self._heads(name, self.kv_heads, "kv_heads")(x) for name in "kv")
        shape = (*x.shape[:2], self.kv_heads, self.head_size)
        return k.reshape(shape), v.reshape(shape)

    def _heads(self, name: str, count: int, axis: str) -> Linear:
        return Linear(count * self.head_size, ("embed", axis), self.bias, name=name)

    def empty_cache(self, batch: int, length: int | None, dtype: jnp.dtype) -> LayerCache:
        """Of `length` slots. ValueError for None, which is for layers whose cache does not grow, and
        for a storage whose groups or bytes the head size does not fill."""
        if length is None:
            raise ValueError("Attention keeps every token: its cache needs a length")
        shape = (batch, length, self.kv_heads, self.head_size)
        formats, scales = (self.storage.keys, self.storage.values), self.storage.scale_dtype
        return LayerCache(*(empty(shape, dtype, format, scales) for format in formats))


def require_plain(storage: Storage, what: str) -> None:
    """ValueError, naming `what` cannot, for keys or values in few bits."""
    if storage.keys is not None or storage.values is not None:
        raise ValueError(f"{what} keeps keys and values as they are, not as {storage}")


def even_head_size(width: int, heads: int) -> int:
    """width / heads; ValueError naming both when heads do not divide the width."""
    if width % heads:
        raise ValueError(
            f"{heads} heads do not divide the width {width}: give a head size, or others"
        )
    return width // heads
