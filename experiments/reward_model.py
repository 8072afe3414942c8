"""How many pairs does a reward model need?  InstructGPT's reward model (Ouyang et al. 2022, arXiv:2203.02155),
and whether it learned more than length (Singhal et al. 2023, arXiv:2310.03716).

The first 8 layers of SmolLM2-135M-Instruct with LoRA and a head of one output learn from 30, 60, 120 or 240 real
English pairs of answers by −log σ(r_w − r_l) + 0.01 (r_w + r_l)²; 56 other pairs, about other prompts, are held
out. Each run has the same number of steps. The head reads the mean over all tokens; once more with 240 pairs the
last token alone, as is usual. Measured on the held-out pairs: how often the chosen answer has the higher score,
the mean margin, the loss (ln 2 is chance), the expected calibration error and the temperature that would
calibrate; how scores go with the length of whole answers; and on 56 of the training pairs the accuracy. Beside
it a judge without a model: the longer answer wins.

Differs from the papers: 8 layers of 30 of a small model, hundreds of pairs instead of tens of thousands; prompts
lose all but their last `prompt` tokens and answers what is beyond `length`, so that the length of most
is not seen. 56 pairs have a standard error of 0.07.
Run:    .venv/bin/python -m experiments.reward_model --sweep   (10 runs)
Expect: held-out accuracy rising from 0.65 with 30 pairs to above 0.7 with 240, where all tokens are read, while that
        of the training pairs falls; the last token alone at chance; no rule about length.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.shared import reward_training, sft
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_layers
from experiments.shared.reward_training import HEAD, Recipe
from research.data import corpora, preferences, shuffle
from research.data.packing import Table
from research.data.preferences import Preference
from research.evaluate import reward_models
from research.evaluate.ranking import pairwise_accuracy, spearman
from research.models.heads import Head, last_token, masked_mean
from research.runs import chain, main, param, product, results
from research.tokenize import chat

PAIRS = {"30": 30, "60": 60, "120": 120, "240": 240}
POOLS = {"all tokens": masked_mean, "the last": last_token}
BINS = 5  # of the calibration error: 56 pairs fill no more


@dataclasses.dataclass(frozen=True)
class Config:
    """`length`: of an answer with the last `prompt` tokens before it; a row has two."""

    pairs: int = 240
    recipe: Recipe = Recipe()
    head: Head = HEAD
    layers: int = 8
    length: int = 192
    prompt: int = 64
    held_out: int = 56
    seed: int = 0


@cache
def data(held_out: int) -> tuple[list[tuple[str, Preference]], list[tuple[str, Preference]]]:
    """Pairs to train on and held out, (place, pair), without a prompt in both."""
    rows = [(place, preferences.preference(row, place)) for place, row in corpora.preferences_en()]
    train, held = sft.split(rows, held_out, key=lambda row: repr(row[1].prompt))
    leaked = preferences.overlap((row for _, row in train), (row for _, row in held))
    if leaked:
        raise ValueError(f"{len(leaked)} held-out prompts are among those to train on: {leaked[0]}")
    return train, held


def tables(config: Config) -> tuple[Table, Table]:
    """Rows of the run's own training pairs, which its seed chooses, and the held-out ones."""
    tokenizer = smollm2_layers(config.layers).tokenizer
    encode = reward_training.recent(partial(chat.encode_chat, tokenizer), config.prompt)
    train, held = data(config.held_out)
    chosen = shuffle.permutation(config.seed, 0, len(train))[: config.pairs]
    parts = [train[i] for i in chosen], held
    return tuple(reward_training.rows(part, encode, config.length) for part in parts)


def run(config: Config, directory: Path) -> dict[str, float]:
    base, (train, held) = smollm2_layers(config.layers), tables(config)
    params = reward_training.trained(
        base, train, config.recipe, config.seed, directory, config.head
    )
    ask = partial(reward_models.pair_scores, base.model, config.head, params)
    few = {name: values[: config.held_out] for name, values in train.items()}
    of_train, of_held = map(lengths, data(config.held_out))
    return measured(ask(held), of_held) | {
        "train/accuracy": pairwise_accuracy(*ask(few).T),
        "longer/held_out": pairwise_accuracy(*of_held.T),
        "longer/train": pairwise_accuracy(*of_train.T),
    }


def measured(scores: np.ndarray, characters: np.ndarray) -> dict[str, float]:
    """Of scores and lengths [P, 2], chosen first. No temperature where none is best."""
    margins = scores[:, 0] - scores[:, 1]
    found = {
        "accuracy": pairwise_accuracy(*scores.T),
        "margin": float(margins.mean()),
        "spread": float(margins.std()),
        "score": float(scores.mean()),
        "loss": reward_models.pair_loss(margins),
        "ece": reward_models.calibration_error(margins, bins=BINS),
        "of_length": spearman(scores.ravel(), characters.ravel()),
    }
    try:
        return found | {"temperature": reward_models.calibrated_temperature(margins)}
    except ValueError:
        return found


def lengths(pairs: list[tuple[str, Preference]]) -> np.ndarray:
    """Characters of both whole answers of each pair, [P, 2], chosen first."""
    return np.array([[len(pair.chosen), len(pair.rejected)] for _, pair in pairs])


COLUMNS = {
    "accuracy": "accuracy",
    "of training pairs": "train/accuracy",
    "margin": "margin",
    "its deviation": "spread",
    "loss, nats": "loss",
    "calibration error": "ece",
    "temperature": "temperature",
    "rank correlation with length": "of_length",
}


def table(rows: list[results.Row]) -> str:
    """A line for each number of pairs and each head; means over seeds, of accuracies the deviation too."""
    found = cells(rows, BASE, pairs=PAIRS, **{"head.pool": POOLS})
    lines = [
        [*labels, *(_cell(group, key) for key in COLUMNS.values())]
        for labels, group in found.items()
    ]
    first = next(iter(found.values()))
    return markdown(["pairs", "the head reads", *COLUMNS], lines) + (
        f"\nThe longer answer was chosen in {first.statistic('longer/held_out').mean:.3f} of the held-out pairs, "
        f"{first.statistic('longer/train').mean:.3f} of the others. Chance: loss {math.log(2):.3f}.\n"
    )


def _cell(group: results.Group, key: str) -> str:
    try:
        value = group.statistic(key)
    except KeyError:
        return "none"
    more = f" ± {value.std:.3f}" if key == "accuracy" and value.std is not None else ""
    return f"{value.mean:.3f}{more}"


def figure(rows: list[results.Row]) -> Figure:
    """Accuracy by number of pairs, held out and trained on, a point a seed."""
    found = cells(rows, BASE, pairs=PAIRS)
    drawing = Figure(figsize=(5, 3), layout="constrained")
    axes = drawing.subplots()
    for key, name, colour in (
        ("accuracy", "held-out pairs", "C0"),
        ("train/accuracy", "training pairs", "C1"),
    ):
        sizes = [int(pairs) for (pairs,) in found]
        axes.plot(sizes, [g.statistic(key).mean for g in found.values()], colour, label=name)
        for size, group in zip(sizes, found.values(), strict=True):
            seeds = [results.metrics(row)[key] for row in group.rows]
            axes.plot([size] * len(seeds), seeds, f"{colour}.")
    longer = next(iter(found.values())).statistic("longer/held_out").mean
    axes.axhline(longer, color="0.5", linestyle="--", label="the longer wins")
    axes.axhline(0.5, color="0.8", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("pairs to train on")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)
    return drawing


BASE = Config()
SWEEP = chain(
    product(param("pairs", *PAIRS.values()), param("seed", 0, 1)),
    product(param("head.pool", last_token), param("seed", 0, 1)),
)
SMOKE = {
    "pairs": 4,
    "recipe.steps": 2,
    "recipe.warmup_steps": 1,
    "recipe.batch_size": 2,
    "layers": 1,
    "length": 32,
    "prompt": 8,
    "held_out": 6,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
