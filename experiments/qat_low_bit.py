"""Is it better to train with rounded matrices than to round trained ones?  Esser et al. 2019, LSQ.

A small decoder is trained on Shakespeare, and then trained on for some steps in full precision or with
the matrices of its blocks rounded to symmetric integers of 4, 3 and 2 bits, one scale a channel:
    rounded          trained on in full precision, then each channel scaled by its largest number
    clipped          the same, each channel's range shrunk to the least squared error (`quantize.clip`)
    straight-through trained on rounded, the gradient passing the rounding (arXiv:1308.3432)
    LSQ              trained on rounded, the scales trained too (arXiv:1902.08153)
All see the same batches from the same start. What trains rounded is measured as `Quantized` matrices
after `fake.finish`, and how far that is from what was trained is said below the table.

Differs from the paper: a decoder of a million parameters and likelihood, not ResNets and ImageNet; weights
alone are rounded, by channel and not by layer; embeddings, the tied head and norms are not; Adam, which
undoes LSQ's scale of the steps' gradients, so that steps learn at a tenth of the rate instead. With
one scale for both signs rounding leaves one code of 2^bits unused, LSQ uses it: at 2 bits three
levels against four. One rate for all, tried for none.
Run:    bash scripts/cpu.sh .venv/bin/python -m experiments.qat_low_bit --sweep   (2 seeds, about 10 min)
Expect: at 4 bits all near full precision; at 3 bits training with rounding ahead of rounding after it; at 2
        bits rounding after training far behind, clipping winning a part back, and LSQ nearest to full
        precision (the paper: a ResNet-18 of 2 bits 3 points below full, of 3 bits none).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.shared import small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.few_bits import LINEAR, sizes
from experiments.shared.small_lm import Recipe, Trained
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.quantize import clip
from research.runs import main, param, results
from research.train import optim
from research.train.optim import AdamW
from research.types import Params
from research.weights import fake
from research.weights.formats import Integer
from research.weights.quantized import quantize


@dataclasses.dataclass(frozen=True)
class Config:
    """`more_steps` after the recipe's, at a peak of `more_lr`; LSQ's steps at `step_rate` of it."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    ffn: int = 384
    bits: tuple[int, ...] = (4, 3, 2)
    group: int | str = "row"
    recipe: Recipe = Recipe(steps=300)
    more_steps: int = 60
    more_lr: float = 1e-3
    step_rate: float = 0.1
    seed: int = 0


AFTER = {"rounded": quantize, "clipped": clip.quantize}  # (params, rule, format) -> params
WHILE = {"straight-through": False, "LSQ": True}  # whether steps are learned
METHODS = (*AFTER, *WHILE)


def continued(config: Config) -> Recipe:
    """The recipe of the further steps."""
    return dataclasses.replace(config.recipe, steps=config.more_steps, lr=config.more_lr)


def optimizer_of(config: Config, learned_step: bool) -> AdamW:
    """The recipe's; learned steps do not decay and have a rate of their own."""
    plain = continued(config).optimizer()
    if not learned_step:
        return plain
    return dataclasses.replace(
        plain,
        rates=((fake.NO_DECAY, config.step_rate), (r".*", 1.0)),
        decay=((fake.NO_DECAY, False), *optim.DECAY),
    )


def run(config: Config, directory: Path) -> dict[str, float]:
    recipe, length = config.recipe, max(config.recipe.eval_lengths)
    data = small_lm.data(recipe)
    sizes_of = (config.layers, config.width, config.heads, config.heads, config.ffn)
    model = llama(recipe.vocab_size, *sizes_of, max_length=512, tied=True)

    def measured(params: Params) -> float:
        found = small_lm.likelihood(
            Decoder(model), params, data, recipe.eval_lengths, recipe.eval_tokens
        )
        return found[length].per_token

    def train_on(name: str, params: Params, learned_step: bool = False) -> Trained:
        print(f"  training on: {name}", flush=True)
        place, seed = directory / name, config.seed + 1000
        optimizer = optimizer_of(config, learned_step)
        parts = {"params": params, "optimizer": optimizer}
        return small_lm.train(model, data, continued(config), place, seed, **parts)

    base = small_lm.train(model, data, recipe, directory / "base", config.seed)
    plain = train_on("full", base.params)
    full = plain.likelihood[length].per_token
    found = {"nll/base": base.likelihood[length].per_token, "nll/full": full}
    apart = 0.0
    for bits in config.bits:
        format = Integer(bits, config.group)
        few = {name: round_(plain.params, LINEAR, format) for name, round_ in AFTER.items()}
        for name, learned in WHILE.items():
            start = fake.add(base.params, LINEAR, format, learned)
            trained = train_on(f"{name}-{bits}", start, learned)
            few[name] = fake.finish(trained.params)
            found[f"trained/{name}/{bits}"] = trained.likelihood[length].per_token
        for name, params in few.items():
            nll = measured(params)
            found |= {f"nll/{name}/{bits}": nll, f"rise/{name}/{bits}": nll - full}
            apart = max(apart, abs(nll - found.get(f"trained/{name}/{bits}", nll)))
        found[f"bits_per_parameter/{bits}"] = sizes(few["rounded"])["bits_per_parameter"]
    return found | {"finished_apart": apart}


NOTE = """
Held-out nats a token, {full} trained on in full precision ({base} before); in brackets what each is above
it, by seed. Mean ± standard deviation over {seeds} seeds. A finished model is within {apart:.1e} nats of the one
that was trained. With its scales a number takes {sizes} bits.
"""


def table(rows: list[results.Row]) -> str:
    """A line for each method, a column for each number of bits."""
    group = cells(rows, BASE)[()]

    def cell(method: str, bits: int) -> str:
        nll, rise = (group.statistic(f"{kind}/{method}/{bits}") for kind in ("nll", "rise"))
        return f"{nll.mean:.3f} (+{rise})" if rise.mean >= 0 else f"{nll.mean:.3f} ({rise})"

    lines = [[method, *(cell(method, bits) for bits in BASE.bits)] for method in METHODS]
    widths = [group.statistic(f"bits_per_parameter/{bits}").mean for bits in BASE.bits]
    note = NOTE.format(
        full=group.statistic("nll/full"),
        base=group.statistic("nll/base"),
        seeds=len(group.rows),
        apart=max(results.metrics(row)["finished_apart"] for row in group.rows),
        sizes=", ".join(f"{width:.2f}" for width in widths),
    )
    return markdown(["matrices", *(f"{bits} bits" for bits in BASE.bits)], lines) + note


def figure(rows: list[results.Row]) -> Figure:
    """Nats above full precision against bits, a line a method."""
    group = cells(rows, BASE)[()]
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    for number, method in enumerate(METHODS):
        found = [group.statistic(f"rise/{method}/{bits}") for bits in BASE.bits]
        axes.errorbar(
            np.array(BASE.bits) + 0.03 * (number - 1.5),
            [each.mean for each in found],
            yerr=[each.std or 0 for each in found],
            marker="o^sD"[number],
            markersize=4,
            capsize=3,
            label=method,
        )
    axes.set_yscale("symlog", linthresh=0.05)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(BASE.bits)
    axes.set(xlabel="bits", ylabel="nats above full precision (linear below 0.05)")
    axes.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = param("seed", 0, 1)
SMOKE = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "ffn": 24,
    "bits": (2,),
    "more_steps": 2,
    "recipe": small_lm.SMOKE,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
