"""How a model knows where a token stands.

A position scheme has four hooks, each the identity unless it says otherwise: `embedding` is added
to the tokens' own (see `additive`), `tables(positions)` is computed once per forward pass, `rotate`
turns queries and keys by it inside every layer, and `slopes` is a bias on the scores by distance
(ALiBi). `most` says how many positions there are, where there is an end. A scheme that does not
count but reads in the tokens where they stand says so in `place` (see `prefix`).

Rope: Su et al. 2021, RoFormer (arXiv:2104.09864). Frequencies are theta^(-2i/d); context extension
by Linear (Chen et al. 2023, arXiv:2306.15595), Ntk (fixed factor), Llama3 (Llama 3.1's bands) or
Yarn (Peng et al. 2023, arXiv:2309.00071). The two layouts are permutations of each other:
half-split pairs feature i with i + d/2 (Hugging Face), interleaved pairs 2i with 2i+1 (Meta, GLM).
Alibi: Press et al. 2021 (arXiv:2108.12409).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from research.kernels.mask import Mask
from research.types import Array

Tables = tuple[Array, Array] | None


@dataclasses.dataclass(frozen=True)
class NoPosition:
    """Positions are not told to the model (and the hooks that other schemes refine)."""

    @property
    def most(self) -> int | None:
        """Positions are 0..most-1; None when they have no end."""
        return None

    def embedding(self, width: int) -> Callable[[Array], Array] | None:
        """positions [B, T] -> what is added to the embeddings [B, T, width], a layer or a function."""
        return None

    def tables(self, positions: Array, head_size: int) -> Tables:
        """positions [B, T] -> whatever `rotate` needs."""
        return None

    def rotate(self, x: Array, tables: Tables) -> Array:
        """x [B, T, N, H] -> the same shape."""
        return x

    def slopes(self, heads: int) -> Array | None:
        """[N], or None when distance does not bias the scores."""
        return None

    def context(self, batch: int) -> Any:
        """What a cache remembers for `place` of `batch` rows of which nothing has been read."""
        return None

    def place(
        self, tokens: Array, positions: Array, mask: Mask, context: Any
    ) -> tuple[Array, Mask, Any]:
        """Positions, mask and context of new tokens [B, T], of which `positions` says the index
        in their row. `context` is None without a cache."""
        return positions, mask, context

    def missing(self, prompt: Sequence[int]) -> str | None:
        """What `place` would look for in vain, as the end of a sentence; None if nothing."""
        return None


class Scaling(Protocol):
    """A change of RoPE's frequencies for contexts longer than those trained on."""

    def frequencies(self, inverse: np.ndarray, theta: float) -> np.ndarray: ...

    @property
    def amplitude(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float
    amplitude = 1.0

    def frequencies(self, inverse: np.ndarray, theta: float) -> np.ndarray:
        return inverse / self.factor


@dataclasses.dataclass(frozen=True)
class Ntk:
    """theta * factor^(d/(d-2)): the slowest wave is stretched by `factor`, the fastest not at all."""

    factor: float
    amplitude = 1.0

    def frequencies(self, inverse: np.ndarray, theta: float) -> np.ndarray:
        half = len(inverse)
        return inverse * self.factor ** (-np.arange(half) / max(half - 1, 1))


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Short waves kept, long waves divided by `factor`, a smooth band between (Llama 3.1)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    amplitude = 1.0

    def frequencies(self, inverse: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_length * inverse / (2 * math.pi)  # within the original context
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(smooth, 0, 1)
        return inverse * (keep + (1 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Waves with more than `beta_fast` turns kept, fewer than `beta_slow` interpolated."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by: 0.1 ln(factor) + 1 unless given."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def _index(self, turns: float, half: int, theta: float) -> float:
        """The (real-valued) frequency index that makes `turns` turns within the original context."""
        return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)

    def frequencies(self, inverse: np.ndarray, theta: float) -> np.ndarray:
        half = len(inverse)
        low = max(math.floor(self._index(self.beta_fast, half, theta)), 0)
        high = min(math.ceil(self._index(self.beta_slow, half, theta)), 2 * half - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
        return inverse * (1 - ramp + ramp / self.factor)


@dataclasses.dataclass(frozen=True)
class Rope(NoPosition):
    """Rotary embedding of the first `fraction` of each head's features."""

    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: Linear | Ntk | Llama3 | Yarn | None = None

    def frequencies(self, head_size: int) -> np.ndarray:
        """[rotated features / 2] radians per position, float64."""
        rotated = int(head_size * self.fraction)
        if rotated % 2:
            raise ValueError(f"RoPE turns pairs of features: {rotated} of head size {head_size}")
        inverse = self.theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        return inverse if self.scaling is None else self.scaling.frequencies(inverse, self.theta)

    def tables(self, positions: Array, head_size: int) -> Tables:
        """cos and sin, each [B, T, 1, rotated / 2] float32."""
        inverse = jnp.asarray(self.frequencies(head_size), jnp.float32)
        angle = positions[..., None, None].astype(jnp.float32) * inverse
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude

    def rotate(self, x: Array, tables: Tables) -> Array:
        cos, sin = tables
        half = cos.shape[-1]
        rotated = x[..., : 2 * half].astype(jnp.float32)
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., :half], rotated[..., half:]
        turned = (first * cos - second * sin, second * cos + first * sin)
        if self.interleaved:
            out = jnp.stack(turned, axis=-1).reshape(rotated.shape)
        else:
            out = jnp.concatenate(turned, axis=-1)
        return jnp.concatenate([out.astype(x.dtype), x[..., 2 * half :]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rope2d(NoPosition):
    """Half of each head's features turned by one position, the other half by another (ChatGLM-6B).

    Both halves are half-split by themselves. positions [B, T, 2]; [B, T] stands for second
    positions of 0, which turn nothing, and a negative position is nan.
    """

    theta: float = 10_000.0

    def tables(self, positions: Array, head_size: int) -> Tables:
        """cos and sin, each [B, T, 1, H / 2] float32: of the first half, then of the second."""
        if head_size % 4:
            raise ValueError(f"Rope2d turns pairs in halves of heads; the head size is {head_size}")
        if positions.ndim == 2:
            positions = jnp.stack([positions, jnp.zeros_like(positions)], axis=-1)
        at = jnp.where(positions < 0, jnp.nan, positions.astype(jnp.float32))
        halves = [Rope(self.theta).tables(at[..., half], head_size // 2) for half in (0, 1)]
        cos, sin = (jnp.concatenate(both, axis=-1) for both in zip(*halves, strict=True))
        return cos, sin

    def rotate(self, x: Array, tables: Tables) -> Array:
        halves = zip(*(jnp.split(whole, 2, axis=-1) for whole in (x, *tables)), strict=True)
        turned = [Rope().rotate(part, (cos, sin)) for part, cos, sin in halves]
        return jnp.concatenate(turned, axis=-1)


@dataclasses.dataclass(frozen=True)
class Alibi(NoPosition):
    """slope * (j - i) on the score of query i and key j, each head with its own slope."""

    def slopes(self, heads: int) -> Array:
        return jnp.asarray(alibi_slopes(heads), jnp.float32)


def alibi_slopes(heads: int) -> np.ndarray:
    """[N] float64: 2^(-8i/N) for i = 1..N if N is a power of two.

    Otherwise those of the power of two below, m, and then every second one of 2m.
    """

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    power = 1 << (heads.bit_length() - 1)
    return np.concatenate([geometric(power), geometric(2 * power)[::2][: heads - power]])
