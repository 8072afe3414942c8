"""How large an input may be before it is clipped: ranges, and so scales, for static activations.

    found = ranges.histograms(model, params, windows, r"stack_.*/kernel")
    scales = ranges.scales(found, ranges.entropy)        # {path: [L]}, the size of a step

A histogram holds the magnitudes of all inputs of a matrix, 2,048 bins from 0 to the largest, which a
first pass over the same text finds. A range is one of the edges of its bins:

    absmax       the last: nothing is clipped
    Percentile   the number that so many percent of the magnitudes do not exceed
    mse          the edge whose rounding has the least squared error
    entropy      the edge whose rounded distribution has the least divergence from what was seen, as in
                 TensorRT's calibrator (Migacz, 8-bit inference with TensorRT, GTC 2017)

All are symmetric, for codes -n .. n of n = 2^(bits - 1) - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from research.quantize import calibrate, measures
from research.types import Array, Params


class Histogram(NamedTuple):
    """counts [..., bins] of magnitudes between 0 and top [...]."""

    counts: np.ndarray
    top: np.ndarray


# (counts [bins] float64, bits) -> how many bins the range has, not always a whole number
Range = Callable[[np.ndarray, int], float]


def histograms(
    model: Any,
    params: Params,
    windows: np.ndarray,
    rule: str,
    bins: int = 2048,
    batch_size: int = 4,
) -> dict[str, Histogram]:
    """{path: histogram of its inputs' magnitudes, one for each layer}, in two passes over `windows`.

    Errors as in `calibrate.measure`; a pass should see less than 2^24 numbers of a matrix.
    """
    given = (model, params, windows, rule)
    largest = calibrate.measure(*given, measures.absmax, jnp.maximum, batch_size)
    tops = {name: x.max(axis=-1) for name, x in largest.items()}
    counts = calibrate.measure(*given, measures.Histogram(bins), measures.count, batch_size, tops)
    return {
        name: Histogram(np.asarray(counts[name], np.float64), np.asarray(tops[name]))
        for name in tops
    }


def scales(found: dict[str, Histogram], how: Range, bits: int = 8) -> dict[str, Array]:
    """{path: float32 [...]}: the size of a step of each matrix's inputs, range / (2^(bits - 1) - 1).

    ValueError naming the path of inputs that were all 0, or that had nan or inf.
    """
    most = 2 ** (bits - 1) - 1
    return {
        name: jnp.asarray(_range(name, h, how, bits) / most, jnp.float32)
        for name, h in found.items()
    }


def _range(name: str, found: Histogram, how: Range, bits: int) -> np.ndarray:
    """[...]."""
    if not (np.isfinite(found.top) & (found.top > 0)).all():
        raise ValueError(
            f"inputs of {name} have the largest magnitude {found.top}: no range can be made of it"
        )
    bins = found.counts.shape[-1]
    parts = [how(counts, bits) / bins for counts in found.counts.reshape(-1, bins)]
    return found.top * np.reshape(parts, found.top.shape)


def absmax(counts: np.ndarray, bits: int) -> float:
    return len(counts)


@dataclass(frozen=True)
class Percentile:
    """`percent` of the magnitudes are in the range; within a bin they count as evenly spread."""

    percent: float = 99.99

    def __post_init__(self):
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent is above 0 and at most 100, not {self.percent}")

    def __call__(self, counts: np.ndarray, bits: int) -> float:
        below = np.concatenate([[0], np.cumsum(counts)])
        wanted = self.percent / 100 * below[-1]
        last = int(np.searchsorted(below, wanted)) - 1  # the bin in which it is reached
        return last + (wanted - below[last]) / counts[last]


def mse(counts: np.ndarray, bits: int, stride: int = 8) -> float:
    """The least Σ count (rounded(middle of a bin) - middle)² of every `stride`-th edge."""
    most = 2 ** (bits - 1) - 1
    middles = np.arange(len(counts)) + 0.5
    edges = np.arange(stride, len(counts) + 1, stride)

    def error(edge: int) -> float:
        step = edge / most
        rounded = np.minimum(np.round(middles / step), most) * step
        return float((counts * np.square(rounded - middles)).sum())

    return float(edges[np.argmin([error(edge) for edge in edges])])


def entropy(counts: np.ndarray, bits: int, stride: int = 8) -> float:
    """The least `divergence` of every `stride`-th edge from 2^(bits - 1) on, and the last.

    TensorRT looks at every edge (stride 1).
    """
    levels = 2 ** (bits - 1)
    if len(counts) < levels:
        raise ValueError(f"{levels} levels need as many bins, not {len(counts)}")
    edges = [*range(levels, len(counts), stride), len(counts)]
    return float(edges[np.argmin([divergence(counts, edge, levels) for edge in edges])])


def divergence(counts: np.ndarray, edge: int, levels: int) -> float:
    """KL(P, Q) in nats: P the first `edge` bins with all larger counts in the last of them; Q the same
    bins without these, merged into `levels` groups whose counts are spread over those of their bins
    that hold something. Infinite where Q lacks what P has."""
    seen = counts[:edge]
    p = seen.copy()
    p[-1] += counts[edge:].sum()
    group = np.arange(edge) * levels // edge
    filled = seen > 0
    total = np.bincount(group, seen, levels)
    among = np.bincount(group, filled, levels)
    q = np.where(filled, total[group] / np.maximum(among[group], 1), 0)
    if (q[p > 0] == 0).any():
        return np.inf
    p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
    return float((p * np.log(p / q)).sum())
