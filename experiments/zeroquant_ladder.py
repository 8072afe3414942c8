"""Which step of ZeroQuant brings a quantized model back?  Yao et al. 2022 (arXiv:2206.01861).

Every matrix of SmolLM2-135M-Instruct's blocks in 8 or 4 bits, every input of them in 8, in four rungs,
each the one above with one thing changed:

    RTN            matrices rounded to nearest with one scale a column, inputs with one a tensor
    group-wise     matrices with one scale for 64 numbers of a column
    + token-wise   inputs with one scale a token
    + LKD          each layer distilled from the full one, the layers below it quantized already

All scales of inputs are found in the pass (dynamic). The paper's GPT-3 of 1.3B parameters has a
perplexity of 15.3 on WikiText; W8A8 18.9 by RTN and 15.7 by ZeroQuant; W4/8A8 24.1 without and 18.2 with
LKD, where only the feed-forward matrices have 4 bits; W4/8A16 1.35e5 by RTN, 21.9 by ZeroQuant, 17.6 with LKD.

Differs from the paper: 135M parameters; all matrices of blocks in 4 bits, the tied table in none; groups
of 64 numbers of a column; symmetric scales of inputs found in the pass for RTN too; 8 windows of 512
tokens of the held-out text's kind and 16 steps a layer distil. A layer reads the quantized model's
states and aims at the full model's (`quantize.distill`; `reads_full` is the paper's form), with an
error relative to each token's state. The model is a Q4_1 release made dense: rounded to 4 bits in groups
of 32 once, which may favour 4 bits here.
Run:    bash scripts/cpu.sh .venv/bin/python -m experiments.zeroquant_ladder --sweep   (8 runs, about 8 min idle)
Expect: the paper's order at both widths. At W8A8 the inputs decide: a scale a token takes the rise from 0.79 nats
        to 0.03, groups 0.02 of 0.81, LKD less than its standard error can tell. At W4A8 RTN and groups leave no
        model (1.58 and 1.40 nats), a scale a token 0.44, and LKD takes half of that (0.21). It leaves the matrices
        no nearer to the full ones: what it lowers is the error of the layers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.shared import few_bits
from experiments.shared.cells import cells, markdown
from experiments.shared.few_bits import LINEAR, Text
from experiments.shared.first_layers import smollm2_layers
from research.models.decoder import Decoder
from research.quantize import distill
from research.runs import main, param, product, results
from research.train.optim import AdamW
from research.types import Params
from research.weights import int8
from research.weights.formats import Group, Integer
from research.weights.quantized import quantize


@dataclasses.dataclass(frozen=True)
class Rung:
    """`group` of the matrices' scales, whose largest input scales (`per`), steps of distillation a layer."""

    group: Group
    per: str
    steps: int = 0


RUNGS = {
    "RTN": Rung("row", "tensor"),
    "group-wise": Rung(64, "tensor"),
    "+ token-wise": Rung(64, "token"),
    "+ LKD": Rung(64, "token", steps=16),
}
BITS = {"W8A8": 8, "W4A8": 4}


@dataclasses.dataclass(frozen=True)
class Config:
    """A step of distillation sees `batch_size` calibration windows. `layers`: the first so many alone,
    which are no language model. The seed decides nothing."""

    bits: int = 8
    rung: Rung = RUNGS["RTN"]
    text: Text = Text(calibration=8)
    lr: float = 1e-4
    batch_size: int = 2
    layers: int | None = None
    seed: int = 0


def quantized(
    config: Config, model: Decoder, params: Params, windows: np.ndarray
) -> tuple[Params, dict[str, float]]:
    """The model of a rung; of a distilled one its layers' errors before and after besides."""
    rung = config.rung
    format = Integer(config.bits, rung.group)
    if not rung.steps:
        return int8.add(quantize(params, LINEAR, format), LINEAR, rung.per), {}
    made = distill.quantize(
        model,
        params,
        windows,
        format,
        LINEAR,
        rung.per,
        rung.steps,
        AdamW(config.lr, weight_decay=0.0, clip_norm=None),
        config.batch_size,
        progress=lambda layer: print(f"  {layer}", flush=True),
    )
    errors = {"before": made.before, "after": made.after}
    return made.params, {
        f"layer_{stage}/{number:02}": float(error)
        for stage, each in errors.items()
        for number, error in enumerate(each)
    }


def run(config: Config, directory: Path) -> dict[str, float]:
    base, windows = smollm2_layers(config.layers), few_bits.read(config.text)
    params, errors = quantized(config, base.model, base.params, windows.calibration)
    found = few_bits.measured(base.model, base.params, params, windows.held_out)
    found["matrix_error"] = few_bits.matrix_error(base.params, params, LINEAR)
    return found | few_bits.sizes(params) | errors


def ladder(rows: list[results.Row]) -> dict[tuple[str, str], dict[str, float]]:
    """{(bits, rung): metrics}."""
    found = cells(rows, BASE, bits=BITS, rung=RUNGS)
    return {key: results.metrics(group.rows[-1]) for key, group in found.items()}


HEADS = ["", "rung", "bits", "MB", "matrices", *few_bits.LOSSES]


def table(rows: list[results.Row]) -> str:
    """A line for each rung."""
    found = ladder(rows)
    lines = [
        [
            *key,
            f"{row['bits_per_parameter']:.2f}",
            f"{row['parameter_bytes'] / 1e6:.0f}",
            f"{row['matrix_error']:.4f}",
            *few_bits.losses(row),
        ]
        for key, row in found.items()
    ]
    full = next(iter(found.values()))["full_perplexity"]
    return f"{markdown(HEADS, lines)}\nFull model: perplexity {full:.4g}. {few_bits.NOTE}"


def layer_errors(row: dict[str, float], stage: str) -> list[float]:
    """Of a distilled model's metrics: the error of each layer "before" or "after", the lowest first."""
    return [row[name] for name in sorted(row) if name.startswith(f"layer_{stage}/")]


def figure(rows: list[results.Row]) -> Figure:
    """The rise of nats by rung; and what distillation did to each layer's error."""
    found = ladder(rows)
    drawing = Figure(figsize=(9.5, 3.6), layout="constrained")
    rises, errors = drawing.subplots(1, 2)
    for colour, bits in enumerate(BITS):
        own = {rung: row for (b, rung), row in found.items() if b == bits}
        means, spread = ([row[name] for row in own.values()] for name in ("rise", "rise_se"))
        look = {"marker": "o", "capsize": 3, "color": f"C{colour}", "label": bits}
        rises.errorbar(list(own), means, yerr=spread, **look)
        if after := layer_errors(row := own.get("+ LKD", {}), "after"):
            before = layer_errors(row, "before")
            errors.plot(before, "--", color=f"C{colour}", label=f"{bits}, rounded")
            errors.plot(after, color=f"C{colour}", label=f"{bits}, distilled")
    rises.set(ylabel="nats a token above the full model")
    rises.set_yscale("symlog", linthresh=0.01)  # a rise may be below 0
    errors.set(yscale="log", xlabel="layer", ylabel="error of the states behind it")
    for axes in (rises, errors):
        axes.grid(alpha=0.25)
    rises.legend(frameon=False, fontsize=8)
    if errors.lines:
        errors.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = product(param("bits", *BITS.values()), param("rung", *RUNGS.values()))
SMOKE = {
    "rung": Rung(64, "token", steps=1),
    "layers": 1,
    "text.length": 32,
    "text.held_out": 2,
    "text.calibration": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
