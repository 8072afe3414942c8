"""Which way of rounding keeps a model at 4, 3 and 2 bits?  GPTQ (Frantar et al. 2022,
arXiv:2210.17323) and AWQ (Lin et al. 2023, arXiv:2306.00978) against rounding to nearest.

Four ways to find the integers of every matrix in SmolLM2-135M-Instruct's blocks, all asymmetric in
groups of 64 and so of one size at the same bits: rounding to nearest (RTN); RTN in ranges that are
clipped, by the error of the outputs (research/quantize/clip.py); AWQ, which scales channels and then
clips; and GPTQ, which makes errors good in columns not yet rounded. Perplexity, its rise and the
divergence from the full model on held-out text. The calibration windows are the same 12 of 512 tokens
for the three that need some, from other articles; what they are measured with does not depend on the
bits but for GPTQ, whose layers read what the quantized ones below write.

Differs from the papers: one small model, whose release is Q4_1, made dense: it lies on asymmetric
integers of 4 bits in groups of 32, which is near to what is asked of it at 4 bits; 3 and 2 bits are
new to it. 6,144 tokens calibrate (GPTQ: 128 windows of 2,048), of the same kind as the held-out ones.
AWQ leaves v's channels alone, as query heads share them. Act-order, columns of large inputs first, is
tried at 3 bits only. One more way weighs the first token of each window 50 times: every other one
attends to it, and its inputs, small behind a norm, hardly count in a Hessian otherwise.
Run:    OPENBLAS_NUM_THREADS=1 python -m experiments.gptq_vs_awq_vs_rtn --sweep
        (16 runs, about 15 min; nothing is random. On a machine with other work the Cholesky factors
        of GPTQ otherwise wait for their own threads: six times the time of its arithmetic.)
Expect: not the papers' order. Clipping and AWQ lead throughout, half of RTN's loss at 4 and 3 bits and next to
        each other. GPTQ is no better than RTN in perplexity, for it ruins the token that all attend to: with
        that weighed, a third of its loss goes at 4 and 3 bits, and as much with act-order at 3; RTN is beaten
        then, clipping not. At 2 bits nothing keeps a model; clipping is the least bad, then AWQ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments.shared import few_bits
from experiments.shared.cells import cells, markdown
from experiments.shared.few_bits import LINEAR, Text
from experiments.shared.first_layers import smollm2_layers
from research.quantize import awq, calibrate, clip, gptq_layers, measures
from research.runs import chain, main, param, product, results
from research.types import Params
from research.weights.formats import Integer
from research.weights.quantized import quantize


@cache
def moments_of(layers: int | None, text: Text) -> calibrate.Statistics:
    """Of the inputs of every matrix, in the full model: one pass a process for all bits."""
    base, windows = smollm2_layers(layers), few_bits.read(text).calibration
    return calibrate.measure(base.model, base.params, windows, LINEAR, measures.moments, jnp.add)


def nearest(config: Config, format: Integer) -> Params:
    return quantize(smollm2_layers(config.layers).params, LINEAR, format)


def clipped(config: Config, format: Integer) -> Params:
    params = smollm2_layers(config.layers).params
    return clip.quantize(params, LINEAR, format, moments_of(config.layers, config.text))


def scaled(config: Config, format: Integer) -> Params:
    base = smollm2_layers(config.layers)
    return awq.quantize(base.model, base.params, moments_of(config.layers, config.text), format)


def made_good(config: Config, format: Integer) -> Params:
    base, windows = smollm2_layers(config.layers), few_bits.read(config.text).calibration
    return gptq_layers.quantize(base.model, base.params, windows, LINEAR, format)


def made_good_by_size(config: Config, format: Integer) -> Params:
    """Act-order: columns of large inputs first."""
    base, windows = smollm2_layers(config.layers), few_bits.read(config.text).calibration
    return gptq_layers.quantize(base.model, base.params, windows, LINEAR, format, act_order=True)


def made_good_with_sink(config: Config, format: Integer) -> Params:
    """The first token of a window, which all others attend to, counts 50 times."""
    base, windows = smollm2_layers(config.layers), few_bits.read(config.text).calibration
    return gptq_layers.quantize(base.model, base.params, windows, LINEAR, format, first=50.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """`layers`: the first so many alone, which are no language model. The seed decides nothing."""

    way: Callable[[Config, Integer], Params] = made_good
    bits: int = 3
    group: int = 64
    text: Text = Text()
    layers: int | None = None
    seed: int = 0


WAYS = {"RTN": nearest, "clipped RTN": clipped, "AWQ": scaled, "GPTQ": made_good}
WAYS |= {"GPTQ, act-order": made_good_by_size, "GPTQ, first token × 50": made_good_with_sink}
BITS = {"4": 4, "3": 3, "2": 2}


def run(config: Config, directory: Path) -> dict[str, float]:
    base, windows = smollm2_layers(config.layers), few_bits.read(config.text)
    params = config.way(config, Integer(config.bits, config.group, "integer"))
    found = few_bits.measured(base.model, base.params, params, windows.held_out)
    found |= few_bits.sizes(params)
    if config.way is not scaled:  # its matrices are others before they are rounded
        found["matrix_error"] = few_bits.matrix_error(base.params, params, LINEAR)
    return found


def variants(rows: list[results.Row]) -> dict[tuple[int, str], dict[str, float]]:
    """{(bits, way): metrics}."""
    found = cells(rows, BASE, bits=BITS, way=WAYS)
    return {(int(n), way): results.metrics(group.rows[-1]) for (n, way), group in found.items()}


def table(rows: list[results.Row]) -> str:
    """A line for each number of bits and way, and the full model, to which all are compared."""
    found = variants(rows)
    lines = [
        [
            way,
            f"{row['bits_per_parameter']:.3f}",
            f"{row['matrix_error']:.4f}" if "matrix_error" in row else "–",
            *few_bits.losses(row),
        ]
        for (_, way), row in found.items()
    ]
    full = next(iter(found.values()))["full_perplexity"]
    heads = ["way", "bits", "matrices", *few_bits.LOSSES]
    return f"{markdown(heads, lines)}\nFull model: perplexity {full:.4g}. {few_bits.NOTE}"


def figure(rows: list[results.Row]) -> Figure:
    """The rise in nats and the divergence by bits, with one standard error; a line for each way."""
    found = variants(rows)
    drawing = Figure(figsize=(8, 3.6), layout="constrained")
    panels = drawing.subplots(1, 2)
    shown = {"rise": "rise, nats a token", "divergence": "KL from the full model, nats a token"}
    for axes, (name, title) in zip(panels, shown.items(), strict=True):
        for way in WAYS:
            points = [(bits, row) for (bits, each), row in found.items() if each == way]
            if points:
                axes.errorbar(
                    [bits for bits, _ in points],
                    [row[name] for _, row in points],
                    yerr=[row[f"{name}_se"] for _, row in points],
                    marker="o",
                    capsize=3,
                    label=way,
                )
        axes.set(xlabel="bits of a code", title=title, xticks=sorted(BITS.values()))
        positive = all(row[name] > 0 for row in found.values())
        axes.set_yscale("log" if positive else "symlog")
        axes.title.set_size(10)
        axes.grid(alpha=0.25)
    panels[0].legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = chain(
    product(param("bits", *BITS.values()), param("way", nearest, clipped, scaled, made_good)),
    product(param("bits", 3), param("way", made_good_by_size)),
    product(param("bits", *BITS.values()), param("way", made_good_with_sink)),
)
SMOKE = {"layers": 1, "text.length": 32, "text.held_out": 2, "text.calibration": 48}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
