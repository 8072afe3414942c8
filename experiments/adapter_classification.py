"""How small may an adapter be?  Houlsby et al. 2019, Figs. 3 and 4 (arXiv:1902.00751), at toy scale.

The first layers of SmolLM2-135M-Instruct (experiments/shared/first_layers.py) learn to tell
sarcastic headlines from serious ones by a classification head. Trained are the head alone; adapters
of four sizes with the norms and the head, as in the paper; Pfeiffer's adapters
(arXiv:2005.00247), behind the feed-forward sublayer alone; and all weights. Chance is about one
half.

Differs from the paper: 6 layers of a decoder, not BERT; the states' mean is read, not a [CLS] token;
1,280 headlines seen once, not epochs until convergence; one rate for each of head, adapters and all
weights, with no search: a few single trials on other headlines set the rates, and the pooling
(the last token's state gave 0.53 to 0.57 in 40 steps where the mean gave 0.74). Headlines are cut
after 24 tokens (99 % have 26 or fewer). A standard error of the 400 test headlines is 0.02.
Run:    python -m experiments.adapter_classification --sweep   (7 methods x 2 seeds, about 8 min)
Expect: the paper's shape within the spread of two seeds: adapters of every size, two numbers wide too, near all
        weights (0.77 to 0.78), the head alone behind them by 0.02 to 0.03.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
from matplotlib.figure import Figure

from experiments.shared import headline_classes
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import first_layers, smollm2_instruct
from research.adapters import bottleneck
from research.models import heads
from research.runs import main, param, product, results
from research.train.optim import AdamW
from research.train.schedules import Cosine

WITH_ADAPTERS = rf"{bottleneck.WITH_NORMS}|{heads.TRAINABLE}"


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained: `insert` puts adapters of `size` in (None puts none), `trains` is a path rule."""

    insert: Callable | None = bottleneck.houlsby
    size: int = 32
    trains: str = WITH_ADAPTERS
    lr: float = 2e-3


METHODS = {
    "head alone": Method(None, 0, heads.TRAINABLE, 1e-2),
    "Houlsby, size 2": Method(size=2),
    "Houlsby, size 8": Method(size=8),
    "Houlsby, size 32": Method(size=32),
    "Houlsby, size 128": Method(size=128),
    "Pfeiffer, size 32": Method(bottleneck.pfeiffer),
    "all weights": Method(None, 0, r".*", 2e-4),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """`train` and `test` count headlines, of `length` tokens at most; a step sees batch_size."""

    method: Method = METHODS["Houlsby, size 32"]
    layers: int = 6
    warmup_steps: int = 8
    steps: int = 80
    batch_size: int = 16
    length: int = 24
    train: int = 2000
    test: int = 400
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    method, base = config.method, first_layers(smollm2_instruct(), config.layers)
    data = headline_classes.read(base.tokenizer, config.train, config.test, config.length)
    model, params = base.model, base.params
    if method.insert is not None:
        rng = jax.random.fold_in(jax.random.key(config.seed), 1)
        model, params = method.insert(model, params, rng, method.size)
    params = headline_classes.with_head(model, params, config.seed)
    schedule = Cosine(method.lr, config.steps, config.warmup_steps)
    optimizer = AdamW(schedule, weight_decay=0.0)
    _, found = headline_classes.tune(
        model, params, method.trains, optimizer, data, config, directory
    )
    return found


def methods(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, method=METHODS).items()}


def table(rows: list[results.Row]) -> str:
    """A line for each method; what it trains is given as a part of all weights too."""
    found = methods(rows)
    trained = {name: g.statistic("trainable_parameters").mean for name, g in found.items()}
    full = trained.get("all weights")
    lines = [
        [
            name,
            f"{trained[name]:,.0f}",
            f"{100 * trained[name] / full:.3g} %" if full else "",
            group.statistic("accuracy"),
        ]
        for name, group in found.items()
    ]
    seeds = min(len(group.rows) for group in found.values())
    note = f"\nAccuracy on held-out headlines, mean ± standard deviation over {seeds} seeds.\n"
    return markdown(["trained", "parameters", "of all", "accuracy"], lines) + note


def figure(rows: list[results.Row]) -> Figure:
    """Accuracy against trained parameters, as the paper's Fig. 3; Houlsby's sizes are one line."""
    found = methods(rows)
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    for kind in dict.fromkeys(name.split(",")[0] for name in found):
        groups = [g for name, g in found.items() if name.split(",")[0] == kind]
        scores = [g.statistic("accuracy") for g in groups]
        axes.errorbar(
            [g.statistic("trainable_parameters").mean for g in groups],
            [s.mean for s in scores],
            yerr=[s.std or 0 for s in scores],
            marker="o",
            capsize=3,
            label=kind,
        )
    axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy on held-out headlines")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = product(param("seed", 0, 1), param("method", *METHODS.values()))
SMOKE = {
    "layers": 1,
    "steps": 2,
    "warmup_steps": 1,
    "batch_size": 2,
    "train": 8,
    "test": 8,
    "method.size": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
