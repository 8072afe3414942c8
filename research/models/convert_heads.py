"""Fewer key/value heads from more: multi-head attention into grouped- or multi-query attention.

Ainslie et al. 2023, GQA (arXiv:2305.13245), section 2.1: the key and value heads of a group become
one by their mean; then the model is trained on for a few per cent of its steps. `first` and `Fresh`
are the paper's two controls (Figure 4).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.models.attention import Attention
from research.models.decoder import DecoderConfig
from research.models.init import Normal
from research.models.stack import layers_of
from research.paths import map_named
from research.types import Array, Params
from research.weights.base import is_weight

# (path, heads [..., heads a group, H]) -> [..., H]
Pool = Callable[[str, Array], Array]


def mean(path: str, heads: Array) -> Array:
    return heads.mean(axis=-2)


def first(path: str, heads: Array) -> Array:
    return heads[..., 0, :]


@dataclasses.dataclass(frozen=True)
class Fresh:
    """New heads as at the start of training: N(0, std²) matrices, biases of 0."""

    seed: int = 0
    std: float = 0.02

    def __call__(self, path: str, heads: Array) -> Array:
        shape = heads.shape[:-2] + heads.shape[-1:]
        if path.endswith("/bias"):
            return jnp.zeros(shape, heads.dtype)
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(path.encode()))
        return Normal(self.std)(key, shape, heads.dtype)


def group_heads(
    config: DecoderConfig, params: Params, kv_heads: int, pool: Pool = mean
) -> tuple[DecoderConfig, Params]:
    """The same model with `kv_heads` key/value heads in every layer: (config, params).

    Head k of the result is made of the neighbours k·g .. k·g + g - 1, whose queries already stand
    together. ValueError when a layer's heads are not a multiple of `kv_heads` and when a leaf is
    not an array of plain, stacked parameters (a Weight is merged first).
    """
    blocks = {path: block.attention for path, *_, block in layers_of(config.stacks)}
    for path, attention in blocks.items():
        if not isinstance(attention, Attention) or kv_heads < 1 or attention.kv_heads % kv_heads:
            what = f"{type(attention).__name__} of {attention.kv_heads} key/value heads"
            raise ValueError(f"{path}: {what} cannot be grouped into {kv_heads}")

    def grouped(path: str, leaf: Any) -> Any:
        owner, _, rest = path.partition("/attention/")
        if rest not in ("k/kernel", "v/kernel", "k/bias", "v/bias"):
            return leaf
        attention = blocks.get(owner)
        if attention is None or not isinstance(leaf, jax.Array):
            raise ValueError(f"{path}: expected a stacked array, found {type(leaf).__name__}")
        per_group = attention.kv_heads // kv_heads
        heads = leaf.reshape(*leaf.shape[:-1], kv_heads, per_group, attention.head_size)
        return pool(path, heads).reshape(*leaf.shape[:-1], kv_heads * attention.head_size)

    def of(block: Any) -> Any:
        return block.clone(attention=block.attention.clone(kv_heads=kv_heads))

    stacks = tuple(
        dataclasses.replace(stack, pattern=tuple(map(of, stack.pattern))) for stack in config.stacks
    )
    return dataclasses.replace(config, stacks=stacks), map_named(grouped, params, is_leaf=is_weight)
