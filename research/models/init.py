"""How parameters begin, where a family differs from its layers' own N(0, 0.02).

Rules are (path expression, initializer) pairs, as elsewhere for rates and freezing: the first one
that matches a leaf's whole path gives its values, leaves that none matches keep their own. A
scheme such as GPT-2's or DeepNorm's is a tuple of them in the config, not an argument of layers.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.paths import map_named, named_leaves, require_match
from research.types import Array, Params

Init = Callable[..., Array]
Rules = tuple[tuple[str, Init], ...]


@dataclasses.dataclass(frozen=True)
class Normal:
    """N(0, std²)."""

    std: float

    def __call__(self, rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return self.std * jax.random.normal(rng, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Xavier:
    """N(0, gain² * 2 / (in + out)) for matrices [..., in, out] (Glorot & Bengio 2010)."""

    gain: float = 1.0

    def __call__(self, rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return Normal(self.gain * (2 / (shape[-2] + shape[-1])) ** 0.5)(rng, shape, dtype)


def begin(params: Params, rules: Rules, rng: Array) -> Params:
    """`params` with the leaves that a rule matches drawn anew; RuleError for one that matches none.

    A leaf's key depends on its path alone, so that it does not change with the leaves beside it.
    """
    names = [name for name, _ in named_leaves(params)]
    for pattern, _ in rules:
        require_match(pattern, names)

    def redraw(path: str, leaf: Array) -> Array:
        for pattern, draw in rules:
            if re.fullmatch(pattern, path):
                key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
                return draw(key, leaf.shape, leaf.dtype)
        return leaf

    return map_named(redraw, params)
