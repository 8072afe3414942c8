"""The mathematics of attention on one tile, apart from what runs it (FlashAttention-2, Dao 2023).

A tile is some rows (queries) by some keys. These functions see arrays alone, so the loops for a CPU
(`blockwise`) and the Pallas kernels (`flash1`, `flash2`, `decode`) share them. Scores are in base 2,
log2(e) times the natural ones, because exp2 is what hardware has; so is the log-sum-exp of a row.

Masked scores are MASKED, a large negative number in place of -inf: exp2(MASKED - x) is 0 for every
score x, and MASKED - MASKED is not nan. A row that saw nothing keeps MASKED as its peak, gets zeros
and a log-sum-exp of -MASKED, by which every probability of the backward pass is 0 again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from research.kernels.dropout import check_rate, seed_of
from research.kernels.mask import Mask
from research.kernels.tiles import tile_visible
from research.types import Array

LOG2E = math.log2(math.e)
MASKED = -1e30


@dataclass(frozen=True)
class Score:
    """What is static of a score: scale of q·k; softcap c, which bends it to c·tanh(x/c); rate of dropout."""

    scale: float
    softcap: float | None = None
    rate: float = 0.0

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"a soft cap must be above 0, not {self.softcap}")


def scoring(
    H: int, scale: float | None, softcap: float | None, dropout: tuple[float, Array] | None
) -> tuple[Score, Array | None]:
    """(Score, seed of dropout) from the arguments of an attention kernel for heads of H numbers."""
    rate, rng = (0.0, None) if dropout is None else dropout
    score = Score(float(H**-0.5 if scale is None else scale), softcap, rate)
    return score, None if rate == 0 else seed_of(rng)


class Rows(NamedTuple):
    """What rows know of the keys they have seen: greatest score, sum of powers, weighted values."""

    peak: Array  # [rows]
    total: Array  # [rows]
    out: Array  # [rows, H], not divided by total yet


def dot(a: Array, b: Array) -> Array:
    """a [m, k] @ b [k, n] in float32; float32 inputs are not rounded to fewer bits first."""
    exact = a.dtype == jnp.float32
    return lax.dot(
        a,
        b,
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def bent(product: Array, score: Score) -> Array:
    """q·k -> the scaled and soft-capped score, in base 2."""
    scores = product * (score.scale * LOG2E)
    if score.softcap is None:
        return scores
    cap = score.softcap * LOG2E
    return cap * jnp.tanh(scores / cap)


def unbent_grad(grad: Array, scores: Array, score: Score) -> Array:
    """Gradient in what `bent` gave -> gradient in scale * q·k."""
    if score.softcap is None:
        return grad
    return grad * (1 - jnp.square(scores / (score.softcap * LOG2E)))


def masked_scores(scores: Array, mask: Mask, i: Array, j: Array, S: int, masked: bool) -> Array:
    """Adds ALiBi and hides what `tile_visible` hides, unless the tile is known to be seen whole.

    `mask` is that of the tile; i and j are positions of queries and keys, oriented as the tile is.
    """
    if mask.slopes is not None:
        gap = (j - i - mask.offset).astype(jnp.float32)
        scores += mask.slopes * LOG2E * gap
    return jnp.where(tile_visible(mask, i, j, S), scores, MASKED) if masked else scores


def begin(rows: int, H: int) -> Rows:
    return Rows(jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((rows, H)))


def absorb(state: Rows, scores: Array, v: Array, kept: Array | None = None) -> Rows:
    """Rows after one more tile: scores [rows, keys], v [keys, H]; `kept` multiplies probabilities.

    The sum that divides at the end is over all probabilities, dropped ones too.
    """
    peak = jnp.maximum(state.peak, scores.max(1))
    powers = jnp.exp2(scores - peak[:, None])
    shrink = jnp.exp2(state.peak - peak)
    total = state.total * shrink + powers.sum(1)
    weights = powers if kept is None else powers * kept
    return Rows(peak, total, state.out * shrink[:, None] + dot(weights.astype(v.dtype), v))


def finish(state: Rows) -> tuple[Array, Array]:
    """(out [rows, H], log-sum-exp [rows] in base 2), float32."""
    sees = state.peak > MASKED / 2
    total = jnp.where(sees, state.total, 1)
    out = jnp.where(sees[..., None], state.out / total[..., None], 0)
    return out, jnp.where(sees, state.peak + jnp.log2(total), -MASKED)


def tile_grads(
    scores: Array, lse: Array, value_product: Array, delta: Array, kept: Array | None
) -> tuple[Array, Array]:
    """(probabilities as the values met them, gradient in the scores) of a tile, either orientation.

    `value_product` is dO·v, `delta` a row's dO·O; lse and delta are broadcast along the rows.
    """
    weights = jnp.exp2(scores - lse)
    if kept is None:
        return weights, weights * (value_product - delta)
    return weights * kept, weights * (value_product * kept - delta)
