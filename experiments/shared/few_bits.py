"""A quantized SmolLM2 beside the one it was made of: what experiments of few bits measure alike.

    base = smollm2_instruct()                           # the Q4_1 release made dense: "full" below
    windows = read(config.text)
    params = quantize(base.params, LINEAR, Integer(4, 64))
    row = measured(base.model, base.params, params, windows.held_out) | sizes(params)

The base was 4-bit once: what is measured is the loss against its dequantized weights, not against the
model that was trained. Calibration and held-out windows come from different articles of the same
encyclopedia; the held-out ones are the same in every experiment that leaves `Text` as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.shared.first_layers import smollm2_instruct
from research.data import corpora
from research.evaluate import quantization
from research.quantize import calibrate
from research.types import Params
from research.weights.quantized import bits_per_parameter, is_quantized

LINEAR = r"stack_0/.*/kernel"  # every matrix of a block
ALL = rf"{LINEAR}|embed/table"  # the tied table too


@dataclasses.dataclass(frozen=True)
class Text:
    """How many windows of `length` tokens are held out, and how many calibrate."""

    length: int = 512
    held_out: int = 12
    calibration: int = 12


class Windows(NamedTuple):
    """Tokens [n, length] each."""

    held_out: np.ndarray
    calibration: np.ndarray


@cache
def read(text: Text) -> Windows:
    """Held-out windows from the encyclopedia's first half, calibration ones from its second, in SmolLM2's
    tokens; evenly spaced, so that they see many articles. Read once a process."""
    encode, whole = smollm2_instruct().tokenizer.encode, corpora.wiki()
    middle = whole.index("\n", len(whole) // 2)
    halves = (whole[:middle], text.held_out), (whole[middle:], text.calibration)
    return Windows(*(spaced(encode(part), text.length, n) for part, n in halves))


def spaced(ids: list[int], length: int, count: int) -> np.ndarray:
    """`count` windows [count, length], as far apart as they can be."""
    every = calibrate.windows_of(ids, length, len(ids) // length)
    if len(every) < count:
        raise ValueError(f"{count} windows of {length} tokens, but the text has {len(every)}")
    return every[np.linspace(0, len(every) - 1, count).round().astype(int)]


def measured(model: Any, full: Params, quantized: Params, windows: np.ndarray) -> dict[str, float]:
    """Likelihood of held-out windows under both, the rise paired by window, and the divergence.

    nll in nats a token; `_se` is the standard error over windows; `rise` = nll - full.
    """
    found = quantization.compare(model, full, quantized, windows, batch_size=2)
    return summary(found)


def summary(found: quantization.Comparison) -> dict[str, float]:
    """What a row keeps of a comparison over two windows or more."""
    rise, error = found.nll - found.full, quantization.standard_error
    return {
        "nll": float(found.nll.mean()),
        "nll_se": error(found.nll),
        "perplexity": math.exp(found.nll.mean()),
        "full_perplexity": math.exp(found.full.mean()),
        "rise": float(rise.mean()),
        "rise_se": error(rise),
        "divergence": float(found.divergence.mean()),
        "divergence_se": error(found.divergence),
        "agreement": float(found.agreement.mean()),
    }


LOSSES = ["perplexity", "rise, nats", "KL, nats", "same token"]
NOTE = (
    "Nats a token over the held-out windows, ± one standard error over windows; the rise is paired by "
    "window.\nMatrices: their mean relative error; bits of a quantized parameter, MB of all.\n"
)


def losses(row: Mapping[str, float]) -> list[str]:
    """What `LOSSES` names, of one row's metrics."""
    return [
        f"{row['perplexity']:.4g} ± {row['perplexity'] * row['nll_se']:.2g}",
        f"{row['rise']:.4f} ± {row['rise_se']:.2g}",
        f"{row['divergence']:.4f} ± {row['divergence_se']:.2g}",
        f"{row['agreement']:.3f}",
    ]


def percent(row: Mapping[str, float]) -> tuple[float, float]:
    """By how many percent perplexity rises, and the standard error over windows, of a row's metrics."""
    factor = math.exp(row["rise"])
    return 100 * (factor - 1), 100 * factor * row["rise_se"]


def matrix_error(full: Params, quantized: Params, rule: str) -> float:
    """The mean relative error ‖W' − W‖ / ‖W‖ of the matrices that `rule` matches, each layer's one."""
    found = quantization.matrix_errors(full, quantized, rule)
    return float(np.concatenate([np.ravel(errors) for errors in found.values()]).mean())


def sizes(params: Params) -> dict[str, float]:
    """Bytes of all arrays; bits of a quantized parameter where there are any."""
    leaves = jax.tree.leaves(params)
    found = {"parameter_bytes": float(sum(leaf.nbytes for leaf in leaves))}
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        found["bits_per_parameter"] = bits_per_parameter(params)
    return found
