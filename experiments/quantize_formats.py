"""What does a model of few bits lose, format by format?  QLoRA's Table 2 (Dettmers et al. 2023,
arXiv:2305.14314).

Every matrix of SmolLM2-135M-Instruct's blocks is rounded to the nearest code, and the likelihood of
held-out text is compared with the full model's: perplexity against bits, scales and zeros counted.
The paper has a mean perplexity of 34.34 for Int4, 31.07 for E2M1, 29.48 for E3M0 and 27.41 for NF4
with double quantization. Of Gaussian numbers in groups of 64 the error is .0897 for Int4 between the
minimum and the maximum, .0921 for NF4, .1057 for E2M1, .1077 for Int4 of the largest magnitude,
.1221 for bitsandbytes' FP4 and .188 for E3M0, which is another order; `matrices` is that of ours.

Differs from the paper: one small model, whose release is Q4_1, made dense: it lies on integers of 4 bits
between the minimum and the maximum of 32 numbers, and that format is here as a control. The other
integers, and nothing else, may gain from this origin. 12 windows of 512 tokens of an encyclopedia;
paired by window, as the windows differ more than the formats. The tied table stays in float32 but
for one run. The exam has two options: its interval is wide.
Run:    python -m experiments.quantize_formats --sweep     (16 runs, 20 min beside other work)
Expect: the paper's end and the order of Gaussian errors, E3M0 apart: at 4.127 bits NF4 + DQ costs 0.25 nats, Int4
        + DQ 0.40; at 4.5 NF4 0.25, E2M1 0.34, FP4 0.39, Int4 0.40, E3M0 0.95, which the paper has second.
        Double quantization costs nothing to be seen. NF4 is ahead of Int4 between minimum and maximum (0.31 at
        5 bits) although its matrices are further off. The release's own grid costs exactly nothing. 8 bits:
        Int8 0.003, E4M3 0.02, E5M2 0.06. 3 bits cost 2.3, and 2 symmetric ones leave no model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.shared import few_bits, sft
from experiments.shared.cells import cells, markdown
from experiments.shared.few_bits import ALL, LINEAR, Text
from experiments.shared.first_layers import smollm2_instruct
from research.runs import main, param, product, results
from research.weights.formats import Codebook, Float8, Format, Integer
from research.weights.quantized import quantize


@dataclasses.dataclass(frozen=True)
class Kind:
    """`format` of the matrices that `rule` matches, None for none; `questions` of the exam are asked."""

    format: Format | None
    rule: str = LINEAR
    questions: int = 0


KINDS = {
    "full": Kind(None, questions=200),
    "Int8, row": Kind(Integer(8, "row")),
    "E4M3, row": Kind(Float8("e4m3")),
    "E5M2, row": Kind(Float8("e5m2")),
    "Int4 min-max, 32": Kind(Integer(4, 32, "minimum")),
    "Int4 min-max": Kind(Integer(4, 64, "minimum")),
    "Int4": Kind(Integer(4, 64)),
    "E2M1": Kind(Codebook("E2M1")),
    "E3M0": Kind(Codebook("E3M0")),
    "FP4": Kind(Codebook("FP4")),
    "NF4": Kind(Codebook("NF4")),
    "Int4 + DQ": Kind(Integer(4, 64, double=True)),
    "NF4 + DQ": Kind(Codebook("NF4", double=True), questions=200),
    "NF4 + DQ, table too": Kind(Codebook("NF4", double=True), ALL),
    "Int3": Kind(Integer(3, 64)),
    "Int2": Kind(Integer(2, 64)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The seed decides nothing."""

    kind: Kind = KINDS["NF4 + DQ"]
    text: Text = Text(calibration=0)
    exam: str = "quartz"
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    base, kind = smollm2_instruct(), config.kind
    windows = few_bits.read(config.text).held_out
    params = base.params
    if kind.format is not None:
        params = quantize(params, kind.rule, kind.format)
    found = few_bits.measured(base.model, base.params, params, windows) | few_bits.sizes(params)
    found["matrix_error"] = few_bits.matrix_error(base.params, params, kind.rule)
    if kind.questions:
        score = sft.exam(dataclasses.replace(base, params=params), config.exam, kind.questions)
        low, high = score.interval
        found |= {"exam": score.value, "exam_low": low, "exam_high": high}
    return found


def kinds(rows: list[results.Row]) -> dict[str, dict[str, float]]:
    """{name: metrics}."""
    found = cells(rows, BASE, kind=KINDS)
    return {name: results.metrics(group.rows[-1]) for (name,), group in found.items()}


def table(rows: list[results.Row]) -> str:
    """A line for each format, in the order of KINDS; and the exam of those who were asked."""
    found = kinds(rows)
    bits = {name: row.get("bits_per_parameter") for name, row in found.items()}
    lines = [
        [
            name,
            "–" if bits[name] is None else f"{bits[name]:.3f}",
            f"{row['parameter_bytes'] / 1e6:.1f}",
            f"{row['matrix_error']:.4f}",
            *few_bits.losses(row),
        ]
        for name, row in found.items()
    ]
    heads = ["format", "bits", "MB", "matrices", *few_bits.LOSSES]
    exams = [
        f"{name} {row['exam']:.3f} ({row['exam_low']:.3f} to {row['exam_high']:.3f})"
        for name, row in found.items()
        if "exam" in row
    ]
    return f"{markdown(heads, lines)}\n{few_bits.NOTE}\nExam, 95 %: {'; '.join(exams)}.\n"


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """Of {name: (bits, perplexity)} those that no other has at fewer bits or lower perplexity
    without paying in the other; by rising bits."""
    best, found = np.inf, []
    for name, (_, perplexity) in sorted(points.items(), key=lambda item: item[1]):
        if perplexity < best:
            best = perplexity
            found.append(name)
    return found


def figure(rows: list[results.Row]) -> Figure:
    """Perplexity against bits, all and those of 4 to 5 bits; the line joins what nothing else beats.

    Error bars are one standard error of the difference to the full model. Formats of other matrices
    too are hollow and not on the line.
    """
    found = {name: row for name, row in kinds(rows).items() if KINDS[name].format is not None}
    points = {n: (row["bits_per_parameter"], row["perplexity"]) for n, row in found.items()}
    line = frontier({n: point for n, point in points.items() if KINDS[n].rule == LINEAR})
    drawing = Figure(figsize=(10, 4), layout="constrained")
    panels = drawing.subplots(1, 2)
    few = [name for name, (bits, _) in points.items() if 4 <= bits <= 5.1]
    for axes, shown in zip(panels, (list(points), few), strict=True):
        for place, (name, row) in enumerate(found.items()):
            if name not in shown:
                continue
            kind = KINDS[name]
            axes.errorbar(
                *points[name],
                yerr=row["perplexity"] * row["rise_se"],
                color=colormaps["tab20"](place),
                marker={Integer: "o", Codebook: "s", Float8: "^"}[type(kind.format)],
                markerfacecolor=None if kind.rule == LINEAR else "none",
                linestyle="none",
                label=name,
            )
        joined = [points[name] for name in line if name in shown]
        if joined:
            axes.plot(*zip(*joined, strict=True), color="grey", linewidth=0.8, zorder=0)
        full = next(iter(found.values()))["full_perplexity"]
        axes.axhline(full, color="black", linestyle=":", linewidth=0.8)
        axes.set(xlabel="bits a parameter", ylabel="perplexity (dotted: full model)")
        axes.grid(alpha=0.25)
    panels[0].set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = product(param("kind", *KINDS.values()))
SMOKE = {"text.length": 32, "text.held_out": 2, "kind.questions": 2}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
