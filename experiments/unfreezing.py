"""Which layers should fine-tuning move, and when?  Howard & Ruder 2018, ULMFiT (arXiv:1801.06146).

The task and model of `adapter_classification`: the first layers of SmolLM2-135M-Instruct tell
sarcastic headlines from serious ones. All weights train at one rate; the head and the norm before it;
the last two layers; all, each at 1 / 2.6 of the rate of the one above it (the paper's discriminative rates,
section 3.2); all, unfrozen from the last to the first (section 3.3); both. What this costs on
general text is measured with the trained layers back in the whole model: nats a token of
encyclopedia text.

Differs from the paper: a decoder of 6 layers with a fresh head on its states' mean, not an LSTM; no
tuning on the task's text before; a depth is unfrozen every 4 steps, not every epoch, and the rate is a
cosine with warmup, not a slanted triangle; 640 headlines. The peak rate is the last depth's, one for
each strategy: those of all weights and of the head were tried once, on other headlines, the
others not at all. A standard error of the 400 test headlines is 0.02.
Run:    python -m experiments.unfreezing --sweep               (6 strategies x 2 seeds, about 8 min)
Expect: all strategies within the spread of two seeds (0.68 to 0.74), the head alone among them. General
        text costs 0.02 nats where all weights move at one rate, a tenth of that with discriminative
        rates or gradual unfreezing, and nothing with the head alone.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

from experiments.shared import headline_classes
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import first_layers, put_back, smollm2_instruct
from research.data import corpora
from research.evaluate import nll
from research.models import heads
from research.paths import assign, named_leaves
from research.runs import main, param, product, results
from research.train import depth
from research.train.depth import ULMFIT, Rates
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Params


@dataclasses.dataclass(frozen=True)
class Strategy:
    """`last` depths train (None: all), each at `decay` of the one above, one more every `every` steps.

    `lr` is the last depth's. With `last`, neither `decay` nor `every` may be given.
    """

    lr: float = 2e-4
    last: int | None = None
    decay: float = 1.0
    every: int = 0

    def __post_init__(self):
        if self.last is not None and (self.decay != 1 or self.every):
            raise ValueError("a strategy has `last`, or `decay` and `every`, not both")

    def rates(self, params: Params) -> Rates:
        total = depth.count(params)
        if self.last is not None:
            return depth.frozen_below(params, total - self.last)
        if self.every:
            return depth.gradual_unfreezing(params, self.every, depth.decayed(total, self.decay))
        return depth.layerwise_decay(params, self.decay)


STRATEGIES = {
    "all weights, one rate": Strategy(),
    "head and final norm": Strategy(3e-3, last=1),
    "last two layers and head": Strategy(5e-4, last=3),
    "discriminative rates": Strategy(1e-3, decay=ULMFIT),
    "gradual unfreezing": Strategy(every=4),
    "both": Strategy(1e-3, decay=ULMFIT, every=4),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Headlines as in `adapter_classification`; `windows` of `window` tokens of general text."""

    strategy: Strategy = Strategy()
    layers: int = 6
    warmup_steps: int = 4
    steps: int = 40
    batch_size: int = 16
    length: int = 24
    train: int = 2000
    test: int = 400
    windows: int = 8
    window: int = 256
    seed: int = 0


def moved(params: Params, rates: Rates) -> int:
    """How many parameters ever have a rate that is not 0; of a stacked leaf, its layers that do."""
    chosen = assign(rates, [name for name, _ in named_leaves(params)])

    def share(rate: object) -> float:
        if isinstance(rate, tuple):
            return sum(each != 0 for each in rate) / len(rate)
        return float(rate is not None)

    return round(sum(leaf.size * share(chosen[name]) for name, leaf in named_leaves(params)))


def general_text(params: Params, windows: int, window: int) -> float:
    """Nats a token of encyclopedia text under the whole model with these parameters."""
    base = smollm2_instruct()
    ids = base.tokenizer.encode(corpora.wiki()[: 8 * windows * window])
    texts = [ids[n * window : (n + 1) * window] for n in range(windows)]
    return nll.of_sequences(base.model, params, texts, batch_size=4).per_token


@cache
def untouched(windows: int, window: int) -> float:
    """`general_text` before training."""
    return general_text(smollm2_instruct().params, windows, window)


def run(config: Config, directory: Path) -> dict[str, float]:
    base = first_layers(smollm2_instruct(), config.layers)
    data = headline_classes.read(base.tokenizer, config.train, config.test, config.length)
    params = headline_classes.with_head(base.model, base.params, config.seed)
    rates = config.strategy.rates(params)
    # What never trains has neither gradient nor state, but for frozen layers of a stack that trains.
    rule = tuple((expression, rate is not None) for expression, rate in rates)
    optimizer = AdamW(
        Cosine(config.strategy.lr, config.steps, config.warmup_steps),
        weight_decay=0.0,
        rates=tuple((expression, rate) for expression, rate in rates if rate is not None),
    )
    tuned, found = headline_classes.tune(
        base.model, params, rule, optimizer, data, config, directory
    )
    whole = put_back(smollm2_instruct().params, heads.remove(tuned))
    return {
        "accuracy": found["accuracy"],
        "trainable_parameters": moved(params, rates),
        "text_nll_before": untouched(config.windows, config.window),
        "text_nll": general_text(whole, config.windows, config.window),
    }


def strategies(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, strategy=STRATEGIES).items()}


def table(rows: list[results.Row]) -> str:
    """A line for each strategy: what it gains on the task, and what it costs elsewhere."""
    found = strategies(rows)
    lines = [
        [
            name,
            f"{group.statistic('trainable_parameters').mean:,.0f}",
            group.statistic("accuracy"),
            group.statistic("text_nll"),
        ]
        for name, group in found.items()
    ]
    before = next(iter(found.values())).statistic("text_nll_before").mean
    seeds = min(len(group.rows) for group in found.values())
    note = (
        f"\nAccuracy on held-out headlines, and nats a token of general text ({before:.4g} before "
        f"training), mean ± standard deviation over {seeds} seeds.\n"
    )
    return markdown(["strategy", "parameters moved", "accuracy", "general text"], lines) + note


def figure(rows: list[results.Row]) -> Figure:
    """Accuracy against nats of general text: up and to the left is better."""
    found = strategies(rows)
    drawing = Figure(figsize=(6, 3.8), layout="constrained")
    axes = drawing.subplots()
    for name, group in found.items():
        text, score = group.statistic("text_nll"), group.statistic("accuracy")
        spread = {"xerr": text.std or 0, "yerr": score.std or 0}
        axes.errorbar(text.mean, score.mean, **spread, marker="o", capsize=3, label=name)
    before = next(iter(found.values())).statistic("text_nll_before").mean
    axes.axvline(before, color="grey", linewidth=0.8)
    axes.set(
        xlabel="general text, nats a token (line: before training)",
        ylabel="accuracy on held-out headlines",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = product(param("seed", 0, 1), param("strategy", *STRATEGIES.values()))
SMOKE = {
    "layers": 1,
    "steps": 2,
    "warmup_steps": 1,
    "batch_size": 2,
    "train": 8,
    "test": 8,
    "windows": 1,
    "window": 32,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
