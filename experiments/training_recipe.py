"""Which parts of a training recipe does a small model feel?  One change at a time from one baseline.

A small GPT-2 is trained from nothing on Shakespeare with other
    initialisations  residual projections / sqrt(2L) (GPT-2), Xavier (Glorot & Bengio 2010), too large
    schedules        cosine (arXiv:1608.03983) without warmup, constant, linear, the inverse square
                     root of 2017 (arXiv:1706.03762), warmup-stable-decay (arXiv:2404.06395)
    regularisers     dropout and label smoothing (arXiv:1706.03762), weight decay (arXiv:1711.05101)
    further losses   z-loss (PaLM, arXiv:2204.02311), max-z loss (Baichuan 2, arXiv:2309.10305)
than N(0, 0.02²), cosine after a warmup, a weight decay of 0.1 and plain cross-entropy. Whatever the
training loss was, held-out text is scored by plain cross-entropy. Differences are taken between runs
of one seed, which see the same batches in the same order.

Differs from the papers: a million parameters, an eighth of the text read once: nothing to overfit.
Every schedule has the same peak, and all but the constant one and 2017's end at a tenth of it.
Run:    python -m experiments.training_recipe --sweep        (17 variants x 2 seeds)
Expect: rates that stay high ahead, as 120 steps are far from convergence; no warmup, larger
        initialisations, dropout and label smoothing behind; weight decay and the further losses at
        their papers' sizes without effect, and z-loss of 1e-2 with log Z two lower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.shared import small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.small_lm import Data, Recipe, Trained
from research.data.source import pretraining_batch
from research.evaluate.logits import logit_scale
from research.losses.lm import Terms
from research.models.decoder import DecoderConfig
from research.models.families.gpt import gpt, init_rules
from research.models.init import Rules, Xavier
from research.objectives import next_token
from research.runs import chain, main, param, product, results
from research.train.finite import NonFiniteError
from research.train.schedules import (
    Constant,
    InverseSquareRoot,
    Linear,
    Schedule,
    WarmupStableDecay,
)


def plain(layers: int, std: float) -> Rules:
    return init_rules(None, std)


def xavier(layers: int, std: float) -> Rules:
    return ((r"stack_.*/kernel", Xavier()),)


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """Tables begin with `std`, the matrices of L layers as `rules(L, std)` say."""

    std: float = 0.02
    rules: Callable[[int, float], Rules] = plain


def cosine(recipe: Recipe) -> Schedule:
    return recipe.optimizer().lr


def cosine_at_once(recipe: Recipe) -> Schedule:
    return dataclasses.replace(cosine(recipe), warmup_steps=0)


def constant(recipe: Recipe) -> Schedule:
    return Constant(recipe.lr, recipe.warmup_steps)


def linear(recipe: Recipe) -> Schedule:
    return Linear(recipe.lr, recipe.steps, recipe.warmup_steps, 0.1 * recipe.lr)


def inverse_square_root(recipe: Recipe) -> Schedule:
    return InverseSquareRoot(recipe.lr, recipe.warmup_steps)


def warmup_stable_decay(recipe: Recipe) -> Schedule:
    """The last tenth of the steps decays, as in the paper."""
    decay_steps = max(recipe.steps // 10, 1)
    return WarmupStableDecay(
        recipe.lr, recipe.steps, decay_steps, recipe.warmup_steps, 0.1 * recipe.lr
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """`dropout`: of embeddings, residual sums and attention probabilities alike."""

    init: Initialisation = Initialisation()
    schedule: Callable[[Recipe], Schedule] = cosine
    dropout: float = 0.0
    loss: Terms = Terms()
    layers: int = 4
    width: int = 128
    heads: int = 4
    recipe: Recipe = Recipe(steps=120)
    seed: int = 0


# Field: {what the table calls it: value}; the first is the baseline's.
FACTORS: dict[str, dict[str, Any]] = {
    "init": {
        "std 0.02": Initialisation(),
        "residual / sqrt(2L)": Initialisation(rules=init_rules),
        "Xavier": Initialisation(rules=xavier),
        "std 0.1": Initialisation(0.1),
        "std 0.2": Initialisation(0.2),
    },
    "schedule": {
        "cosine": cosine,
        "cosine, no warmup": cosine_at_once,
        "constant": constant,
        "linear": linear,
        "inverse square root": inverse_square_root,
        "warmup, stable, decay": warmup_stable_decay,
    },
    "dropout": {"no dropout": 0.0, "dropout 0.1": 0.1},
    "recipe.weight_decay": {"decay 0.1": 0.1, "decay 0": 0.0, "decay 1": 1.0},
    "loss.label_smoothing": {"no smoothing": 0.0, "label smoothing 0.1": 0.1},
    "loss.z_loss": {"no z-loss": 0.0, "z-loss 1e-4": 1e-4, "z-loss 1e-2": 1e-2},
    "loss.max_z_loss": {"no max-z loss": 0.0, "max-z loss 2e-4": 2e-4},
}


def model_of(config: Config) -> DecoderConfig:
    init = config.init
    return gpt(
        config.recipe.vocab_size,
        config.layers,
        config.width,
        config.heads,
        max_length=max(config.recipe.length, *config.recipe.eval_lengths),
        init_std=init.std,
        init_rules=init.rules(config.layers, init.std),
        dropout=config.dropout,
        residual_dropout=config.dropout,
        attention_dropout=config.dropout,
    )


def run(config: Config, directory: Path) -> dict[str, float]:
    """`diverged` is 1 where something was not finite, or the end no better than log V."""
    recipe, data = config.recipe, small_lm.data(config.recipe)
    optimizer = dataclasses.replace(recipe.optimizer(), lr=config.schedule(recipe))
    objective = partial(next_token, **dataclasses.asdict(config.loss))
    try:
        parts = {"optimizer": optimizer, "objective": objective}
        trained = small_lm.train(model_of(config), data, recipe, directory, config.seed, **parts)
    except NonFiniteError as error:
        print(f"  diverged: {error}", flush=True)
        return {"diverged": 1.0}
    found = trained.metrics()
    lost = found[f"nll/{max(recipe.eval_lengths)}"] >= np.log(recipe.vocab_size)
    return found | {"diverged": float(lost)} | logits_of(trained, data, recipe)


def logits_of(trained: Trained, data: Data, recipe: Recipe) -> dict[str, float]:
    """Over one batch of held-out windows, the same in every run."""
    batch = pretraining_batch(data.held_out, recipe.length, recipe.batch_size, seed=0, step=0)
    scale = logit_scale(trained.model, trained.params, [batch])
    return {"log_partition": scale.log_partition, "largest_logit": scale.largest}


def variants(rows: list[results.Row]) -> dict[str, results.Group]:
    """The sweep's runs by what was changed, "baseline" first."""
    found = cells(rows, BASE, **FACTORS)
    base = tuple(next(iter(labels)) for labels in FACTORS.values())
    keys = {"baseline": base}
    for place, labels in enumerate(FACTORS.values()):
        for label in list(labels)[1:]:
            keys[label] = (*base[:place], label, *base[place + 1 :])
    return {label: found[key] for label, key in keys.items() if key in found}


NLL = "nll/128"
SCALE = {"log_partition": "log Z", "largest_logit": "largest logit"}
NOTE = """
Differences are between runs of one seed, mean ± standard deviation over seeds. Diverged: not finite,
or at the end no better than the uniform guess.
"""


def changes(group: results.Group, baseline: results.Group) -> list[float]:
    """Held-out nats a token less the baseline's of the same seed, by seed."""
    own, base = (
        {row["config"]["seed"]: results.metrics(row).get(NLL) for row in each.rows}
        for each in (group, baseline)
    )
    pairs = [(own[seed], base.get(seed)) for seed in sorted(own)]
    return [nll - before for nll, before in pairs if None not in (nll, before)]


def signed(change: results.Statistic) -> str:
    spread = "" if change.std is None else f" ± {change.std:.4f}"
    return f"{change.mean:+.4f}{spread}"


def table(rows: list[results.Row]) -> str:
    found = variants(rows)
    lines = []
    for label, group in found.items():
        has = {name for row in group.rows for name in results.metrics(row)}
        nll, *scale = (group.statistic(n) if n in has else "–" for n in (NLL, *SCALE))
        moved = changes(group, found["baseline"]) if "baseline" in found else []
        lost = [results.metrics(row)["diverged"] for row in group.rows]
        shown = signed(results.summary(moved)) if moved and label != "baseline" else "–"
        lines.append([label, nll, shown, f"{sum(lost):g} of {len(lost)}", *scale])
    heads = ["changed", "held-out nats a token", "less the baseline's", "diverged"]
    return markdown([*heads, *SCALE.values()], lines) + NOTE


def figure(rows: list[results.Row]) -> Figure:
    """A hollow dot a seed, a filled one their mean."""
    found = variants(rows)
    baseline = found.pop("baseline")
    drawing = Figure(figsize=(6, 5), layout="constrained")
    axes = drawing.subplots()
    for place, group in enumerate(found.values()):
        moved = changes(group, baseline)
        axes.plot(moved, [place] * len(moved), "o", color="C0", markerfacecolor="none")
        if moved:
            axes.plot(np.mean(moved), place, "o", color="C0")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set(xlim=(-1, 1), xticks=(-1, -0.1, 0, 0.1, 1))
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("held-out nats a token less the baseline's (linear within ±0.05)")
    return drawing


BASE = Config()
SWEEP = product(
    chain([{}], *(param(name, *list(each.values())[1:]) for name, each in FACTORS.items())),
    param("seed", 0, 1),
)
SMOKE = {"layers": 1, "width": 16, "heads": 2, "recipe": small_lm.SMOKE}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
