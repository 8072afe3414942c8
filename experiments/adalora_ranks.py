"""Where does AdaLoRA put its ranks?  Zhang et al. 2023, Tables 1 and 2, Figure 3 (arXiv:2303.10512).

SmolLM2-135M-Instruct tells sarcastic headlines from serious ones, with LoRA of rank 4 on all seven
matrices of a block, and with AdaLoRA, which starts with 6 triplets a matrix and keeps 4 on average.
A row holds the final rank of every matrix of every layer.

Differs from the paper: 135M parameters, not DeBERTaV3's 184M; 96 steps of 8 headlines, not epochs of
GLUE; one budget. The budget counts triplets, as there, and triplets of wide matrices have more
parameters: what is left is counted too. Each method has its own rate.
Run:    python -m experiments.adalora_ranks --sweep        (2 methods x 2 seeds, about 8 min on 2 idle cores)
Expect: not the paper's order: AdaLoRA behind from the first steps on (its E begin at 0) to the last.
        Ranks in part as there: most for W v, W down and W up, the feed-forward ones in the upper layers,
        W v in the lowest; least for W q and W k. Two seeds agree on that, less on single matrices.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.shared import methods, sarcasm
from experiments.shared.cells import cells, markdown
from research.runs import main, param, product, results
from research.types import Params
from research.weights import adalora, lora
from research.weights.base import is_weight

RANK = 4
METHODS = {
    f"LoRA, r = {RANK}": methods.LoRA(rank=RANK),
    f"AdaLoRA, 6 to {RANK}": methods.AdaLoRA(rank=RANK, start=6),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A step sees batch_size headlines of at most `length` tokens."""

    method: methods.Method = METHODS[f"AdaLoRA, 6 to {RANK}"]
    warmup_steps: int = 10
    steps: int = 96
    batch_size: int = 8
    length: int = 24
    train: int = 2000
    test: int = 400
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, Any]:
    adapted, data = sarcasm.prepare(config)
    params, found = sarcasm.adapt(adapted, data, config, directory)
    ranks = {path: np.asarray(count).tolist() for path, count in adalora.ranks(params).items()}
    return found | {"final_parameters": final_parameters(params), "ranks": ranks}


def final_parameters(params: Params) -> int:
    """Trained numbers that still act: a triplet whose singular value is 0 has none."""
    nodes = jax.tree.leaves(params, is_leaf=is_weight)
    pairs = sum(w.a.size + w.b.size for w in nodes if isinstance(w, lora.LoRA))
    triplets = sum(
        int(np.count_nonzero(w.e)) * (w.a.shape[-2] + w.b.shape[-1] + 1)
        for w in nodes
        if adalora.is_adalora(w)
    )
    return pairs + triplets


def variants(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, method=METHODS).items()}


def table(rows: list[results.Row]) -> str:
    """The paper's Table 1 turned, with what is left of the parameters; then the ranks by matrix."""
    found = variants(rows)
    counts = ("trainable_parameters", "final_parameters")
    lines = [
        [
            name,
            *(f"{group.statistic(count).mean:,.0f}" for count in counts),
            group.statistic("accuracy"),
            group.statistic("nll"),
        ]
        for name, group in found.items()
    ]
    heads = ["method", "trained parameters", "of them at the end", "accuracy", "label nats"]
    seeds = min(len(group.rows) for group in found.values())
    note = f"\n{BASE.test} held-out headlines, mean over {seeds} seed{'s' * (seeds > 1)}; chance is 0.693 nats.\n"
    return markdown(heads, lines) + note + "\n" + by_matrix(ranks(rows))


def by_matrix(grid: dict[str, np.ndarray]) -> str:
    """Mean final rank of each kind of matrix, over all layers and over thirds of the depth."""
    thirds = {name: np.array_split(line, 3) for name, line in grid.items()}
    lines = [
        [name, f"{line.mean():.2f}", *(f"{part.mean():.2f}" for part in thirds[name])]
        for name, line in grid.items()
    ]
    return markdown(["final rank", "all layers", "lower third", "middle", "upper third"], lines)


def ranks(rows: list[results.Row]) -> dict[str, np.ndarray]:
    """{"q": [L], ..., "down": [L]}: AdaLoRA's final ranks, mean over seeds, in the order of a block."""
    group = next((g for name, g in variants(rows).items() if name.startswith("AdaLoRA")), None)
    if group is None:
        raise ValueError("there is no row of AdaLoRA yet, whose ranks could be shown")
    by_seed = [row["metrics"]["ranks"] for row in group.rows]
    order = ["q", "k", "v", "o", "gate", "up", "down"]
    paths = sorted(by_seed[0], key=lambda path: order.index(path.split("/")[-2]))
    return {
        path.split("/")[-2]: np.mean([each[path] for each in by_seed], axis=0) for path in paths
    }


def figure(rows: list[results.Row]) -> Figure:
    """The paper's Figure 3: final rank by layer and matrix."""
    grid = ranks(rows)
    drawing = Figure(figsize=(8, 2.8), layout="constrained")
    axes = drawing.subplots()
    most = max(line.max() for line in grid.values())
    image = axes.imshow(list(grid.values()), aspect="auto", cmap="viridis", vmin=0, vmax=most)
    axes.set_yticks(range(len(grid)), [f"W {name}" for name in grid])
    axes.set(xlabel="layer")
    drawing.colorbar(image, ax=axes, label="final rank")
    return drawing


BASE = Config()
SWEEP = product(param("method", *METHODS.values()), param("seed", 0, 1))
SMOKE = {
    "steps": 5,
    "warmup_steps": 1,
    "train": 8,
    "test": 4,
    "batch_size": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
