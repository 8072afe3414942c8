"""Does an MLP make prefix tuning stable?  Li & Liang 2021, section 4.3 (arXiv:2101.00190).

The paper makes its prefix by an MLP while it trains, as to train the keys and values themselves was
unstable, sensitive to rate and initialisation. P-tuning v2 (Liu et al. 2022, arXiv:2110.07602) does
without. Both here, three seeds each (initial values, and the order of the rows), on the task of
`peft_compare`: SmolLM2-135M-Instruct tells sarcastic headlines from serious ones.

Differs from the paper: a label word, not generated text; 8 virtual tokens; 48 steps of 8 headlines,
where it has epochs; a rate for each way, neither searched for.
Run:    python -m experiments.prefix_stability --sweep        (6 runs, about 9 min on 2 idle cores)
Expect: the paper's shape in the nats, where the MLP's seeds lie close together and ahead; but neither way
        has learned the task after 384 headlines: both answer as a coin would, weighted by the classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from matplotlib.figure import Figure

from experiments.shared import methods, sarcasm
from experiments.shared.cells import cells, markdown
from research.runs import main, param, product, results

METHODS = {
    "MLP": methods.METHODS["prefix tuning"],
    "keys and values themselves": methods.METHODS["P-tuning v2"],
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A step sees batch_size headlines of at most `length` tokens."""

    method: methods.Method = METHODS["MLP"]
    warmup_steps: int = 5
    steps: int = 48
    batch_size: int = 8
    length: int = 24
    train: int = 2000
    test: int = 200
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    adapted, data = sarcasm.prepare(config)
    return sarcasm.adapt(adapted, data, config, directory)[1]


def variants(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, method=METHODS).items()}


def scores(group: results.Group, name: str) -> list[float]:
    return [results.metrics(row)[name] for row in group.rows]


def table(rows: list[results.Row]) -> str:
    """Mean, spread and worst of the seeds."""
    found = variants(rows)
    lines = [
        [
            name,
            f"{group.rows[0]['config']['method']['lr']:g}",
            f"{group.statistic('trainable_parameters').mean:,.0f}",
            group.statistic("accuracy"),
            f"{min(scores(group, 'accuracy')):.3f}",
            group.statistic("nll"),
            f"{max(scores(group, 'nll')):.3f}",
        ]
        for name, group in found.items()
    ]
    heads = ["what trains", "rate", "parameters", "accuracy", "worst seed"]
    seeds = min(len(group.rows) for group in found.values())
    note = f"\n{BASE.test} held-out headlines, {seeds} seeds, mean ± standard deviation; chance is 0.693 nats.\n"
    return markdown([*heads, "label nats", "worst seed"], lines) + note


def figure(rows: list[results.Row]) -> Figure:
    """A dot a seed: accuracy and nats."""
    found = variants(rows)
    drawing = Figure(figsize=(7, 2.2), layout="constrained")
    axes = drawing.subplots(1, 2, sharey=True)
    for place, group in enumerate(found.values()):
        for each, name in zip(axes, ("accuracy", "nll"), strict=True):
            values = scores(group, name)
            each.plot(values, [place] * len(values), "o", color="C0", markerfacecolor="none")
            each.plot(sum(values) / len(values), place, "|", color="C0", markersize=16)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].set(xlabel="accuracy, held out", ylim=(len(found) - 0.5, -0.5))
    axes[1].set(xlabel="nats of the label word (line: a coin)")
    axes[1].axvline(0.693, color="grey", linewidth=0.8)
    return drawing


BASE = Config()
SWEEP = product(param("seed", 0, 1, 2), param("method", *METHODS.values()))
SMOKE = {
    "steps": 2,
    "warmup_steps": 1,
    "train": 8,
    "test": 4,
    "batch_size": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
