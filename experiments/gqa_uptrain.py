"""Do pooled heads recover?  Ainslie et al. 2023 (arXiv:2305.13245), Table 1 and Figure 4, small.

A multi-head decoder is trained on Shakespeare; its key/value heads are pooled to fewer, by their
mean, by taking the first of each group, or drawn anew; and each is trained on for 5 % of the steps.
The multi-head model itself goes on for as long beside them.

Differs from the paper: a million parameters and likelihood, not T5 and tasks; decoder only.
Run:    python -m experiments.gqa_uptrain --sweep        (2 seeds, 8 short trainings on one long)
Expect: after uptraining grouped heads near the multi-head model, one head a little behind (Table 1:
        47.2, 47.1, 46.6); mean before first before fresh (Figure 4). Found: first before mean, the
        rest as said (LOG.md).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from matplotlib.figure import Figure

from experiments.shared import small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.small_lm import Recipe
from research.models.convert_heads import Fresh, Pool, first, group_heads, mean
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.runs import main, param, results


@dataclasses.dataclass(frozen=True)
class Config:
    """`share`: uptraining's part of the steps; `uptrain_lr`: the peak there."""

    layers: int = 4
    width: int = 128
    heads: int = 8
    ffn: int = 344
    kv_heads: tuple[int, ...] = (2, 1)
    recipe: Recipe = Recipe(steps=400)
    share: float = 0.05
    uptrain_lr: float = 1e-3
    seed: int = 0


def pools(config: Config) -> dict[str, Pool]:
    return {"mean": mean, "first": first, "fresh": Fresh(config.seed)}


def run(config: Config, directory: Path) -> dict[str, float]:
    recipe = config.recipe
    data = small_lm.data(recipe)
    sizes = (config.layers, config.width, config.heads, config.heads, config.ffn)
    model = llama(recipe.vocab_size, *sizes, max_length=512, tied=True)
    base = small_lm.train(model, data, recipe, directory / "multi_head", config.seed)
    length = max(recipe.eval_lengths)
    steps = max(round(config.share * recipe.steps), 1)
    shorter = dataclasses.replace(recipe, steps=steps, lr=config.uptrain_lr)
    starts = {"multi_head": (model, base.params)}
    for kv_heads in config.kv_heads:
        for name, pool in pools(config).items():
            starts[f"{name}_{kv_heads}"] = group_heads(model, base.params, kv_heads, pool)
    found = {}
    for name, (start, params) in starts.items():
        args = (data, recipe.eval_lengths, recipe.eval_tokens)
        before = small_lm.likelihood(Decoder(start), params, *args)
        after = small_lm.train(
            start, data, shorter, directory / f"{name}_on", config.seed + 1000, params=params
        )
        found[f"before/{name}"] = before[length].per_token
        found[f"after/{name}"] = after.likelihood[length].per_token
    return found


def names(config: Config) -> list[tuple[str, int, str]]:
    """(how, key/value heads, name among the metrics) of every model."""
    grouped = [(how, k, f"{how}_{k}") for k in config.kv_heads for how in pools(config)]
    return [("multi-head", config.heads, "multi_head"), *grouped]


def table(rows: list[results.Row]) -> str:
    group = cells(rows, BASE)[()]
    lines = [
        [how, k, group.statistic(f"before/{name}"), group.statistic(f"after/{name}")]
        for how, k, name in names(BASE)
    ]
    heads = ["heads made by", "key/value heads", "as converted", "uptrained"]
    return markdown(heads, lines) + "\nHeld-out nats a token.\n"


def figure(rows: list[results.Row]) -> Figure:
    group = cells(rows, BASE)[()]
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    shown = names(BASE)
    for when, face in (("before", "none"), ("after", "C0")):
        found = [group.statistic(f"{when}/{name}") for *_, name in shown]
        means, spread = [each.mean for each in found], [each.std or 0 for each in found]
        look = {"fmt": "o", "color": "C0", "markerfacecolor": face, "capsize": 3}
        axes.errorbar(range(len(shown)), means, yerr=spread, label=f"{when} uptraining", **look)
    axes.set_xticks(range(len(shown)), [f"{how}\n{k}" for how, k, _ in shown])
    axes.set(xlabel="heads made by, key/value heads", ylabel="held-out nats a token")
    axes.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = param("seed", 0, 1)
SMOKE = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "ffn": 24,
    "kv_heads": (1,),
    "recipe": small_lm.SMOKE,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
