"""Does LoRA's rank matter?  Hu et al. 2021, Table 6 (arXiv:2106.09685), on a small real model.

SmolLM2-135M-Instruct learns to tell sarcastic headlines from serious ones by a label word, with
LoRA of rank 1 to 64 on two choices of matrices. Chance is about one half.

Differs from the paper: 135M parameters, not GPT-3; headlines, not WikiSQL and MNLI; the scale
alpha / rank is 2 for every rank, so that one learning rate serves them all.
Run:    python -m experiments.lora_rank --sweep        (4 ranks x 2 choices x 2 seeds, about 1 h)
Expect: not the paper's flat table: after 80 steps accuracy still rises with every rank and with more
        matrices, by far more than seeds differ. What trains faster is ahead; nothing has converged.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from matplotlib.figure import Figure

from experiments.shared import sarcasm
from experiments.shared.cells import cells
from experiments.shared.first_layers import smollm2_instruct
from research.runs import main, param, product, results
from research.weights import lora

TARGETS = {"Wq, Wv": r".*/attention/(q|v)/kernel", "Wq, Wk, Wv, Wo": r".*/attention/[qkvo]/kernel"}
RANKS = {str(rank): rank for rank in (1, 2, 8, 64)}


@dataclasses.dataclass(frozen=True)
class Config:
    """`train` and `test` count headlines; a step sees batch_size packed rows of `length` tokens."""

    targets: str = TARGETS["Wq, Wv"]
    rank: int = 8
    scale: float = 2.0
    lr: float = 1e-3
    warmup_steps: int = 8
    steps: int = 80
    batch_size: int = 2
    length: int = 256
    train: int = 2000
    test: int = 400
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    pretrained = smollm2_instruct()
    data = sarcasm.read(pretrained.tokenizer, config.train, config.test, config.length)
    rng = jax.random.fold_in(jax.random.key(config.seed), 1)
    alpha = config.scale * config.rank
    params = lora.add(pretrained.params, config.targets, rng, config.rank, alpha)
    return sarcasm.tune(pretrained.model, params, lora.TRAINABLE, data, config, directory)


def accuracies(rows: list[results.Row]) -> dict[tuple[str, int], results.Statistic]:
    """Accuracy by (choice of matrices, rank), over seeds."""
    found = cells(rows, BASE, targets=TARGETS, rank=RANKS)
    return {(name, int(rank)): g.statistic("accuracy") for (name, rank), g in found.items()}


def table(rows: list[results.Row]) -> str:
    """The form of the paper's Table 6: a line for each choice of matrices, a column for each rank."""
    found = accuracies(rows)
    ranks = sorted({rank for _, rank in found})
    lines = ["| weights | " + " | ".join(f"r = {rank}" for rank in ranks) + " |"]
    lines.append("| --- " * (len(ranks) + 1) + "|")
    for name in TARGETS:
        scores = [str(found.get((name, rank), "")) for rank in ranks]
        lines.append("| " + " | ".join([name, *scores]) + " |")
    seeds = min(statistic.count for statistic in found.values())
    lines.append(f"\nAccuracy on held-out headlines, mean ± standard deviation over {seeds} seeds.")
    return "\n".join(lines) + "\n"


def figure(rows: list[results.Row]) -> Figure:
    found = accuracies(rows)
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    for name in TARGETS:
        points = sorted((rank, s) for (n, rank), s in found.items() if n == name)
        spread = [s.std or 0 for _, s in points]
        ranks, means = [rank for rank, _ in points], [s.mean for _, s in points]
        axes.errorbar(ranks, means, yerr=spread, marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="rank", ylabel="accuracy on held-out headlines")
    axes.set_xticks(sorted({rank for _, rank in found}), minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    return drawing


BASE = Config()
SWEEP = product(
    param("targets", *TARGETS.values()), param("seed", 0, 1), param("rank", *RANKS.values())
)
SMOKE = {
    "steps": 2,
    "warmup_steps": 1,
    "train": 8,
    "test": 8,
    "batch_size": 1,
    "length": 64,
    "rank": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
