"""How a cache keeps keys and values: as they are, or in few bits.

A `LayerCache` holds two `Kept`, each an array [B, S, K, H] or the `Slots` that stand for one; `empty`,
`put` and `get` are the one place where this is looked at. What is written is rounded to the nearest
code at once, by the formats of `weights.formats` over the H numbers of a token and head: "row" is one
scale for each token and head, a number one for each so many of the H. So a slot depends on its own
token alone: tokens may come in any chunks, padding changes nothing, slots may be gathered (beams),
given back and written again (speculative decoding).

    get(put(empty, x, index)) = round(x / s) s, s = max |x| / 127     Integer(8, "row")

Keys are kept as attention compares them, after rotation.

Differs from KIVI (Liu et al. 2024, arXiv:2402.02750):
1. Keys have scales per token, as values have, not per channel over groups of tokens: groups along
   the row would make what a row says depend on the padding before it, and could not be given back.
2. There is no window of recent tokens in full precision, and a prompt too is read from its codes.
   So reading at once is the same function as reading one by one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.codes.packing import pack
from research.types import Array
from research.weights.formats import Format, decoded


@dataclasses.dataclass(frozen=True)
class Storage:
    """The formats of keys and values, None: as they are, in the cache's dtype.

    `scale_dtype` is that of scales, and of zeros that are no integers. ValueError for a format whose
    scales are themselves in few bits.
    """

    keys: Format | None = None
    values: Format | None = None
    scale_dtype: Any = jnp.float16

    def __post_init__(self):
        for name in ("keys", "values"):
            if getattr(getattr(self, name), "double", False):
                raise ValueError(
                    f"a cache has plain scales, {name} would have double quantized ones"
                )


@struct.dataclass
class Slots:
    """codes uint8 [..., S, K, H * bits / 8]; scale [..., S, K, groups]; zero like scale, or None.

    In `format` "matrix" all heads of a token share a scale, [..., S, 1, 1].
    """

    codes: Array
    scale: Array
    zero: Array | None
    format: Format = struct.field(pytree_node=False)


Kept = Array | Slots


def encode(x: Array, format: Format, scale_dtype: Any) -> Slots:
    """x [..., S, K, H] in few bits. ValueError when groups, or whole bytes, do not fill the H."""
    x = x.astype(jnp.float32)
    scale, zero = format.scales(x)
    scale = scale.astype(scale_dtype)
    if zero is not None and jnp.issubdtype(zero.dtype, jnp.floating):
        zero = zero.astype(scale_dtype)
    # Rounded with the scale that will be read, so that the error stays within half a step of it.
    codes = format.round(x, scale.astype(jnp.float32), zero)
    return Slots(pack(codes, format.bits), scale, zero, format)


def empty(shape: tuple[int, ...], dtype: Any, format: Format | None, scale_dtype: Any) -> Kept:
    """Zeros of `shape` [..., S, K, H], all bits of them."""
    if format is None:
        return jnp.zeros(shape, dtype)
    form = jax.eval_shape(lambda: encode(jnp.zeros(shape), format, scale_dtype))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)


def put(kept: Kept, new: Array, index: Array | int) -> Kept:
    """`kept` with new [..., T, K, H] at slots index..index+T-1; no other slot is touched."""
    if isinstance(kept, Slots):
        new = encode(new, kept.format, kept.scale.dtype)
    place = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda old, x: place(old, x.astype(old.dtype), index, -3), kept, new)


def get(kept: Kept, dtype: Any) -> Array:
    """[..., S, K, H]. Of `Slots` a copy: one layer's, where a layer reads it."""
    if not isinstance(kept, Slots):
        return kept.astype(dtype)
    return decoded(kept.codes, kept.scale, kept.zero, kept.format).astype(dtype)


def stored(config: Any, storage: Storage) -> Any:
    """The same DecoderConfig, for the same parameters, with this storage in every layer's cache.

    ValueError naming a layer whose attention has none.
    """

    def of(block: Any) -> Any:
        if "storage" not in block.attention.__dataclass_fields__:
            raise ValueError(f"a {type(block.attention).__name__} has no storage to choose")
        return block.clone(attention=block.attention.clone(storage=storage))

    stacks = (
        dataclasses.replace(stack, pattern=tuple(map(of, stack.pattern))) for stack in config.stacks
    )
    return dataclasses.replace(config, stacks=tuple(stacks))
