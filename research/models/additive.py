"""Positions that are added to the embeddings: learned ones, and the sinusoids of 2017."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np

from research.models.layers import Embedding
from research.models.position import NoPosition
from research.types import Array


@dataclasses.dataclass(frozen=True)
class Learned(NoPosition):
    """A vector for each of `max_length` positions, `position/table` in the parameters (GPT-1 to 3)."""

    max_length: int
    init_std: float = 0.02

    @property
    def most(self) -> int:
        return self.max_length

    def embedding(self, width: int) -> Embedding:
        return Embedding(self.max_length, width, self.init_std, axis=None)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(NoPosition):
    """`sinusoids`, without parameters and without an end."""

    base: float = 10_000.0

    def embedding(self, width: int) -> Callable[[Array], Array]:
        return partial(sinusoids, width=width, base=self.base)


def sinusoids(positions: Array, width: int, base: float = 10_000.0) -> Array:
    """Features 2i and 2i+1 are sin and cos of t / base^(2i/D): positions [...] -> [..., D] float32.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, in the order printed there; tensor2tensor
    has all sines before all cosines. An odd width ends with a sine.
    """
    pair = np.arange(0, width, 2, dtype=np.float64)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(
        base ** (-pair / width), "float32"
    )
    both = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return both.reshape(*positions.shape, -1)[..., :width]
