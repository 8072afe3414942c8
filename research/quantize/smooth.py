"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): what is hard to round moves from inputs to matrices.

A few channels of a norm's output are much larger than the others, and a token that is rounded with one
scale loses the others. Channel j is divided by

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),   both maxima at least 1e-5,

in the norm's scale and bias, and row j of every matrix that reads it is multiplied by s_j. The function
is unchanged. max|W_j| is over the outputs of all these matrices: q, k and v; gate and up, or up alone.

    windows = calibrate.windows_of(ids, 512, 16)
    absmax = calibrate.measure(model, params, windows, NORM_INPUTS, measures.absmax, jnp.maximum)
    params = smooth(model, params, absmax, alpha=0.5)

`search` chooses alpha for each pair and layer by the error of its own outputs, which needs inputs that
were kept (`measures.Sample`).

Differences and choices:
1. The inputs of o and down are not smoothed, as in the paper, since no norm writes them.
2. Alpha 0 is smoothing too, s = 1 / max|W|. An outlier that makes inputs c times larger and the rows
   that read it c times smaller multiplies s by c whatever alpha is: smoothing undoes it wholly.
3. The paper has one alpha for a model, chosen by its perplexity. Here it may differ between layers, and
   `search` looks at one pair at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.quantize.calibrate import Statistics
from research.quantize.rescale import Pair, leaf, norm_pairs, rescale, statistic
from research.types import Array, Params
from research.weights.formats import Integer, rounded

SMALLEST = 1e-5
Alpha = float | Array | Mapping[str, float | Array] | None


def smooth(model: Any, params: Params, absmax: Statistics, alpha: Alpha = 0.5) -> Params:
    """The same function with smoothed norms.

    absmax {kernel: [L, D]} of `NORM_INPUTS`. alpha between 0 and 1: one for all, one for each layer of
    a stack [L], or either for each norm, {'stack_0/block_0/ffn_norm': ...}; None leaves all as it is.
    ValueError for a block that `norm_pairs` refuses, for a norm without alpha or statistics, and for
    alphas that are not as said.
    """
    pairs = norm_pairs(model, params)
    for pair, s in zip(pairs, _all_factors(pairs, params, absmax, alpha), strict=True):
        params = rescale(params, pair, s)
    return params


def errors(
    model: Any,
    params: Params,
    absmax: Statistics,
    samples: Statistics,
    alpha: Alpha,
    format: Integer = Integer(8, "row"),
) -> dict[str, np.ndarray]:
    """{norm: [L]}: squared error over squared size of its readers' outputs, after smoothing by alpha.

    The matrices are rounded to `format` with a scale a column (its group must be "row"), the inputs too
    with a scale a token. samples {kernel: [L, rows, D]} are inputs of `NORM_INPUTS`, `measures.Sample`'s.
    """
    if format.group != "row":
        raise ValueError(f"inputs have a scale a token: the format's group is 'row', not {format}")
    pairs = norm_pairs(model, params)
    found = {}
    for pair, s in zip(pairs, _all_factors(pairs, params, absmax, alpha), strict=True):
        w = jnp.concatenate([leaf(params, name) for name in pair.readers], axis=-1)
        x = statistic(samples, pair.key)
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != s.shape:
            raise ValueError(
                f"samples of {pair.key} are {x.shape}, not {(s.shape[0], '*', s.shape[1])}"
            )
        found[pair.source] = np.asarray(_errors(x, w, s, format))
    return found


def search(
    model: Any,
    params: Params,
    absmax: Statistics,
    samples: Statistics,
    grid: Sequence[float] = tuple(np.arange(0, 1.01, 0.05).round(2)),
    format: Integer = Integer(8, "row"),
) -> dict[str, Array]:
    """{norm: [L]}: of `grid` the alpha whose `errors` are least, for `smooth`."""
    if not len(grid):
        raise ValueError("a search needs at least one alpha, the grid is empty")
    tried = [errors(model, params, absmax, samples, alpha, format) for alpha in grid]
    best = {norm: np.argmin([each[norm] for each in tried], axis=0) for norm in tried[0]}
    return {norm: jnp.asarray(grid, jnp.float32)[at] for norm, at in best.items()}


def _all_factors(
    pairs: list[Pair], params: Params, absmax: Statistics, alpha: Alpha
) -> list[Array]:
    """s [L, D] of each pair."""
    names = {pair.source for pair in pairs}
    if isinstance(alpha, Mapping) and alpha.keys() != names:
        raise ValueError(f"alpha is for {sorted(names)}, not {sorted(alpha)}")
    found = []
    for pair in pairs:
        x = statistic(absmax, pair.key)
        shape = leaf(params, pair.written[0]).shape
        if x.shape != shape:
            raise ValueError(f"absmax of {pair.key} is {x.shape}, not {shape}")
        if alpha is None:
            found.append(jnp.ones(shape))
            continue
        own = _alpha_of(pair, alpha[pair.source] if isinstance(alpha, Mapping) else alpha, shape[0])
        found.append(factors(x, [leaf(params, name) for name in pair.readers], own))
    return found


def _alpha_of(pair: Pair, alpha: float | Array, layers: int) -> Array:
    """[L, 1]."""
    alpha = np.asarray(alpha, np.float32)
    if alpha.shape not in ((), (layers,)) or not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(
            f"alpha of {pair.source} is a number from 0 to 1, or {layers} of them, not {alpha}"
        )
    return jnp.broadcast_to(alpha, (layers,))[:, None]


def factors(absmax: Array, readers: Sequence[Array], alpha: Array) -> Array:
    """s [L, D], the published formula: absmax [L, D], readers [L, D, out], alpha [L, 1]."""
    largest = jnp.max(jnp.stack([jnp.abs(w).max(axis=-1) for w in readers]), axis=0)
    x, w = (jnp.maximum(each.astype(jnp.float32), SMALLEST) for each in (absmax, largest))
    return x**alpha / w ** (1 - alpha)


@partial(jax.jit, static_argnames="format")
def _errors(x: Array, w: Array, s: Array, format: Integer) -> Array:
    """x [L, rows, D], w [L, D, out], s [L, D] -> [L]; a layer at a time, for its memory."""

    def of(layer: tuple[Array, Array, Array]) -> Array:
        x, w, s = (each.astype(jnp.float32) for each in layer)
        exact = x @ w
        found = rounded(x / s, format) @ rounded((w * s[:, None]).T, format).T
        return jnp.square(found - exact).sum() / jnp.square(exact).sum()

    return jax.lax.map(of, (x, w, s))
