"""Which positions reach beyond the trained length?  Press et al. 2021 (arXiv:2108.12409), small.

One decoder with sinusoidal (Vaswani et al. 2017), learned, rotary (Su et al. 2021,
arXiv:2104.09864), ALiBi and no positions at all (Haviv et al. 2022, arXiv:2203.16634), trained on
windows of 128 tokens of Shakespeare and tested on windows of 128, 256 and 512 of the same text.

Differs from the paper: a million parameters, likelihood of non-overlapping windows. All embeddings
are multiplied by sqrt(width) as in 2017, because sinusoids of amplitude 1 drown smaller ones. Learned
positions have no row beyond 128 and are tested there only.
Run:    python -m experiments.position_ablation --sweep        (5 schemes x 2 seeds)
Expect: ALiBi a little better at 512 than at 128, rotary a little worse, sinusoids much worse; without
        positions a little behind at 128 and no worse further on; learned positions and sinusoids, which
        stand in the embeddings, behind after so few steps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from matplotlib.figure import Figure

from experiments.shared import small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.lengths import draw, scores
from experiments.shared.small_lm import Recipe
from research.models.additive import Learned, Sinusoidal
from research.models.families.llama import llama
from research.models.position import Alibi, NoPosition, Rope
from research.runs import main, param, product, results

LENGTH = 128
SCHEMES: dict[str, NoPosition] = {
    "sinusoidal": Sinusoidal(),
    "learned": Learned(LENGTH, init_std=1.0),  # the embeddings' own size, as sinusoids have
    "rotary": Rope(),
    "ALiBi": Alibi(),
    "none": NoPosition(),
}


@dataclasses.dataclass(frozen=True)
class Config:
    position: NoPosition = Rope()
    layers: int = 4
    width: int = 128
    heads: int = 8
    ffn: int = 344
    recipe: Recipe = Recipe(length=LENGTH, steps=160, eval_lengths=(LENGTH, 256, 512))
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    recipe = config.recipe
    sizes = (config.layers, config.width, config.heads, config.heads, config.ffn)
    model = llama(
        recipe.vocab_size,
        *sizes,
        position=config.position,
        max_length=recipe.length,
        tied=True,
        init_std=config.width**-0.5,
        embed_scale=config.width**0.5,
    )
    data = small_lm.data(recipe)
    return small_lm.train(model, data, recipe, directory, config.seed).metrics()


def table(rows: list[results.Row]) -> str:
    lines = []
    for (name,), group in cells(rows, BASE, position=SCHEMES).items():
        found = scores(group, BASE.recipe.eval_lengths)
        lines.append([name, *(found.get(n, "–") for n in BASE.recipe.eval_lengths)])
    heads = ["positions", *(f"{n} tokens" for n in BASE.recipe.eval_lengths)]
    return markdown(heads, lines) + f"\nHeld-out nats a token; trained on {LENGTH} tokens.\n"


def figure(rows: list[results.Row]) -> Figure:
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    groups = {name: each for (name,), each in cells(rows, BASE, position=SCHEMES).items()}
    draw(drawing.subplots(), groups, BASE.recipe.eval_lengths)
    return drawing


BASE = Config()
SWEEP = product(param("position", *SCHEMES.values()), param("seed", 0, 1))
SMOKE = {"layers": 1, "width": 16, "heads": 2, "ffn": 24, "recipe": small_lm.SMOKE}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
