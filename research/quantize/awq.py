"""AWQ (Lin et al. 2023, arXiv:2306.00978): channels that matter are made large before rounding.

A channel whose inputs are large loses least when its row of the matrix is large in its group. So row j
of all matrices that read one input is multiplied by s_j, and what writes channel j is divided by it
(`rescale`): a norm for q, k, v and for gate, up; v's columns for o; up's columns for down.

    s = mean|x|^ratio / sqrt(max · min),    ratio 0, 1/20, ..., 19/20

the power at least 1e-4, max and min over the channels. The ratio is the one whose outputs are nearest
after rounding, and `clip` then shrinks the groups' ranges.

    found = calibrate.measure(model, params, windows, INPUTS, measures.moments, jnp.add)
    params = awq.quantize(model, params, found, Integer(4, 64, "integer"))

The error of the outputs is exact without stored activations: Σ |Q(W diag s) diag(s)^-1 x - W x|² is the
sum over outputs of eᵀ (Σ x xᵀ) e, e their rows of rounding errors. Ratio 0 and a range that is not
clipped are among what is tried, so no group of readers ends with a larger error than by rounding to
nearest (scales that are double quantized apart: the search does not round them).

Differences and choices:
1. The error is that of the readers' own outputs. The published code runs the whole attention, or the
   whole ffn, on stored activations.
2. Where query heads share values, o is not scaled, as there. The input of a down projection behind an
   ungated activation is not scaled either; there the activation divides, here no layer would.
3. q and k are not clipped by default, as there, because their product decides; `clipped` is a rule.
4. The ratios are chosen for each layer, with inputs that no quantized layer has changed, as there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.quantize import clip
from research.quantize.calibrate import Statistics
from research.quantize.rescale import Pair, all_pairs, leaf, rescale, statistic
from research.types import Array, Params
from research.weights.base import change
from research.weights.formats import Format, grouped, rounded
from research.weights.quantized import Quantized, quantized

RATIOS = tuple(ratio / 20 for ratio in range(20))
SMALLEST = 1e-4
MATRICES = r"stack_\d+/.*/kernel"
CLIPPED = r".*/(attention/(v|o)|ffn/\w+)/kernel"


class Scaled(NamedTuple):
    """The same function; moments of its matrices' inputs, now of every reader; {source: ratio [L]}."""

    params: Params
    moments: Statistics
    ratios: dict[str, np.ndarray]


def quantize(
    model: Any,
    params: Params,
    moments: Statistics,
    format: Format,
    rule: str = MATRICES,
    clipped: str | None = CLIPPED,
) -> Params:
    """Params scaled, clipped, and with every matrix whose path `rule` matches whole in few bits.

    moments {path: `measures.moments`} of `rescale.INPUTS`. `clipped` is a rule for the matrices whose
    ranges are searched, None for no such search: only an Integer format has one. Errors as in `scale`
    and `clip.quantize`.
    """
    params, moments, _ = scale(model, params, moments, format)

    def encode(name: str, w: Array, number: int) -> Quantized:
        if clipped is None or not re.fullmatch(clipped, name):
            return quantized(name, w, format)
        return clip.quantize({name: w}, re.escape(name), format, moments)[name]

    return change(params, rule, encode)


def scale(
    model: Any,
    params: Params,
    moments: Statistics,
    format: Format,
    ratios: Sequence[float] = RATIOS,
) -> Scaled:
    """The same function, its channels scaled by the best of `ratios` for each pair and layer.

    ValueError for a block that `all_pairs` refuses, for inputs without moments, and, naming the path,
    for groups that do not fill a matrix.
    """
    if not len(ratios):
        raise ValueError("a search needs at least one ratio, there is none")
    moments, chosen = dict(moments), {}
    for pair in all_pairs(model, params):
        found = statistic(moments, pair.key)
        matrices = _readers(params, pair, format, found)
        mean = found["magnitude"] / found["rows"][:, None]
        tried = [_error(matrices, factors(mean, r), found["second"], format) for r in ratios]
        best = np.asarray(ratios, np.float32)[np.argmin(tried, axis=0)]
        s = factors(mean, jnp.asarray(best)[:, None])
        params, chosen[pair.source] = rescale(params, pair, s), best
        moments |= dict.fromkeys(pair.readers, _over(found, s))
    return Scaled(params, moments, chosen)


def factors(mean: Array, ratio: float | Array) -> Array:
    """s [L, in] of the mean magnitudes [L, in]."""
    power = jnp.maximum(mean**ratio, SMALLEST)
    ends = power.max(axis=-1, keepdims=True) * power.min(axis=-1, keepdims=True)
    return power / jnp.sqrt(ends)


@partial(jax.jit, static_argnames="format")
def output_errors(w: Array, s: Array, second: Array, format: Format) -> Array:
    """Σ |Q(W diag s) diag(s)^-1 x - W x|² of each layer: w [L, in, out], s [L, in], second [L, in, in]."""

    def of(layer: tuple[Array, Array, Array]) -> Array:
        w, s, second = layer
        wrong = rounded((w * s[:, None]).T, format) / s - w.T
        return clip.row_errors(wrong, second).sum()

    return jax.lax.map(of, (w.astype(jnp.float32), s, second))


def _error(matrices: list[Array], s: Array, second: Array, format: Format) -> Array:
    return sum(output_errors(w, s, second, format) for w in matrices)


def _readers(params: Params, pair: Pair, format: Format, found: Any) -> list[Array]:
    """The matrices [L, in, out] that read one input; ValueError for what does not fit."""
    matrices = [leaf(params, name) for name in pair.readers]
    layers, width = matrices[0].shape[:2]
    if found["second"].shape != (layers, width, width):
        raise ValueError(
            f"moments of {pair.key} are {found['second'].shape}, not {(layers, width, width)}"
        )
    try:
        jax.eval_shape(lambda w: grouped(w.mT, format.group), matrices[0])
    except ValueError as error:
        raise ValueError(f"{pair.key} {matrices[0].shape}: {error}") from error
    return matrices


def _over(found: Any, s: Array) -> Any:
    """The moments of inputs divided by s."""
    return {
        "magnitude": found["magnitude"] / s,
        "second": found["second"] / (s[..., :, None] * s[..., None, :]),
        "rows": found["rows"],
    }
