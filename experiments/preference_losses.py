"""What does each preference loss do to the answers that it is given?  All losses on the same pairs.

SmolLM2-135M-Instruct with LoRA learns 40 short English pairs, each once; 30 others are held out. Every
loss has the constants that its paper or its common implementation starts from (`losses.preference`), one
learning rate and the same batches, so that rows differ in the loss alone. Measured on 20 of the pairs that
were seen and on the held-out ones: the share whose margin of log-ratios is above 0, the mean margin,
and how far log π moved from log π_ref of chosen and of rejected answers.

Differs from the papers: 10 steps of 4 pairs, answers cut at 96 tokens with their prompt, one seed, no rate
of its own for each loss. 30 pairs have a standard error of 0.09. f_dpo is the Jensen–Shannon one, since with
the reverse KL it is DPO; BCO's threshold stays 0, as it would need a state.
Run:    .venv/bin/python -m experiments.preference_losses --sweep   (21 runs)
Expect: of seen pairs the margin is learned by heart, 14 to 16 nats of it by most losses, which look alike; held-out
        accuracies do not differ by more than their error. Losses with a likelihood term (ORPO, CPO, SLiC) keep
        held-out chosen answers up, APO-down pushes all answers down, and DiscoPOP begins the wrong way.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from experiments.shared import preference_pairs
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_layers
from experiments.shared.preference_pairs import COLUMNS
from research.data import source
from research.losses.preference import LOSSES, f_dpo
from research.losses.token_preference import TOKEN_LOSSES
from research.objectives import preference, token_preference
from research.objectives.reference import without_adapter
from research.runs import main, param, results
from research.types import Objective

PAIR_LOSSES = LOSSES | {"f_dpo": partial(f_dpo, divergence="js")}
NAMES = {name: name for name in (*PAIR_LOSSES, "ld_dpo", "tdpo2")}


@dataclasses.dataclass(frozen=True)
class Config(preference_pairs.Setting):
    """`loss`: of `losses.preference.LOSSES` or `losses.token_preference.TOKEN_LOSSES`."""

    loss: str = "dpo"


def objective(config: Config) -> Objective:
    """With cached log-probabilities of the reference, or live where whole distributions are needed."""
    model = smollm2_layers(config.layers).model
    if config.loss in TOKEN_LOSSES:
        return token_preference(model, TOKEN_LOSSES[config.loss], without_adapter)
    return preference(model, PAIR_LOSSES[config.loss])


def run(config: Config, directory: Path) -> dict[str, float]:
    (train, _), (before, _) = preference_pairs.of_setting(config)
    rows = train | {"reference": before.log_probs}
    batches = source.pair_source(rows, config.batch_size, config.seed)
    params = preference_pairs.tuned(config, objective(config), batches, directory)
    return preference_pairs.moved(config, params)


def table(rows: list[results.Row]) -> str:
    """A line for each loss."""
    found = cells(rows, BASE, loss=NAMES)
    lines = [
        [name, *(f"{group.statistic(key).mean:.2f}" for key in COLUMNS.values())]
        for (name,), group in found.items()
    ]
    return markdown(["loss", *COLUMNS], lines) + (
        "\nMargins of log-ratios and how far answers moved, log π − log π_ref, in nats an answer.\n"
    )


def figure(rows: list[results.Row]) -> Figure:
    """How far chosen and rejected answers moved by loss, in the order of the margin on seen pairs."""
    found = cells(rows, BASE, loss=NAMES)
    order = sorted(found.items(), key=lambda item: item[1].statistic("seen/margin").mean)
    drawing = Figure(figsize=(8, 5.5), layout="constrained")
    for axes, part in zip(drawing.subplots(1, 2, sharey=True), ("seen", "held_out"), strict=True):
        ends = [
            [group.statistic(f"{part}/{key}").mean for _, group in order]
            for key in ("chosen", "rejected")
        ]
        axes.hlines(range(len(order)), *ends, color="0.7")
        for moved, key, marker in zip(ends, ("chosen", "rejected"), "os", strict=True):
            axes.plot(moved, range(len(order)), marker, label=key)
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_yticks(range(len(order)), [name for (name,), _ in order])
        axes.set(xlabel="log π − log π_ref, nats", title=f"pairs {part.replace('_', ' ')}")
    axes.legend(frameon=False)
    return drawing


BASE = Config()
SWEEP = param("loss", *NAMES)
SMOKE = {
    "loss": "tdpo2",
    "steps": 2,
    "warmup_steps": 1,
    "batch_size": 2,
    "length": 64,
    "longest_prompt": 56,
    "held_out": 30,
    "layers": 1,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
