"""Learning-rate schedules: frozen dataclasses that map a step (counted from 0) to a rate.

All warm up linearly, `peak * (step + 1) / warmup_steps`, so that the first step is never dead and
the peak is reached by the last step of the warmup. Decay is measured from the end of the warmup:
step `warmup_steps` is at the peak, step `steps` (the first one after training) at `end`.

    Cosine             Loshchilov & Hutter 2017 (arXiv:1608.03983), one cycle, no restarts
    InverseSquareRoot  Vaswani et al. 2017 (arXiv:1706.03762), section 5.3
    WarmupStableDecay  Hu et al. 2024, MiniCPM (arXiv:2404.06395), with a linear decay
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from research.types import Array

Schedule = Callable[[Array], Array]


@dataclass(frozen=True)
class Constant:
    peak: float
    warmup_steps: int = 0

    def __call__(self, step: Array) -> Array:
        return self.peak * _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Linear:
    peak: float
    steps: int
    warmup_steps: int = 0
    end: float = 0.0

    def __post_init__(self):
        _require_room(self.steps, self.warmup_steps)

    def __call__(self, step: Array) -> Array:
        progress = _progress(step, self.warmup_steps, self.steps)
        decayed = self.peak + (self.end - self.peak) * progress
        return decayed * _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    peak: float
    steps: int
    warmup_steps: int = 0
    end: float = 0.0

    def __post_init__(self):
        _require_room(self.steps, self.warmup_steps)

    def __call__(self, step: Array) -> Array:
        progress = _progress(step, self.warmup_steps, self.steps)
        share = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        decayed = self.end + (self.peak - self.end) * share
        return decayed * _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class InverseSquareRoot:
    """peak * sqrt(warmup_steps / (step + 1)) once warm.

    The paper's D^-0.5 min(t^-0.5, t warmup^-1.5), t counted from 1, is `of_width`: a peak of
    (D warmup)^-0.5.
    """

    peak: float
    warmup_steps: int = 1

    @classmethod
    def of_width(cls, width: int, warmup_steps: int, factor: float = 1.0) -> InverseSquareRoot:
        """`factor` times the paper's rate for a model of that width."""
        return cls(factor * (width * warmup_steps) ** -0.5, warmup_steps)

    def __call__(self, step: Array) -> Array:
        warm = max(self.warmup_steps, 1)
        now = jnp.asarray(step, jnp.float32) + 1.0
        return self.peak * jnp.minimum(now / warm, jnp.sqrt(warm / now))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Warm up, stay at the peak, and fall linearly to `end` over the last `decay_steps`."""

    peak: float
    steps: int
    decay_steps: int
    warmup_steps: int = 0
    end: float = 0.0

    def __post_init__(self):
        _require_room(self.steps, self.warmup_steps + self.decay_steps - 1)

    def __call__(self, step: Array) -> Array:
        progress = _progress(step, self.steps - self.decay_steps, self.steps)
        decayed = self.peak + (self.end - self.peak) * progress
        return decayed * _warmup(step, self.warmup_steps)


def _warmup(step: Array, warmup_steps: int) -> Array:
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(1.0, (step + 1.0) / max(warmup_steps, 1))


def _progress(step: Array, start: int, end: int) -> Array:
    """0 up to `start`, 1 from `end` on."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)


def _require_room(steps: int, taken: int) -> None:
    if steps <= taken:
        raise ValueError(f"a schedule of {steps} steps has no room for {taken} of warmup and decay")
