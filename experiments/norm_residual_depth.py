"""Where does the norm stand, and how deep can the model be?

Post-norm (Vaswani et al. 2017), pre-norm (Xiong et al. 2020, arXiv:2002.04745) and DeepNorm (Wang et
al. 2022, arXiv:2203.00555) in narrow decoders of 6 and 18 layers on Shakespeare, at a modest and a
high learning rate: held-out loss, and the norms of the gradient at the start for the first and the
last layer's feed-forward.

Differs from the papers: language modelling, width 64, up to 18 layers and not 1,000, and every run
warms up. All begin from Xavier, DeepNorm from its own scaled form of it, with embeddings times
sqrt(width): without that scale post-norm stays at the frequencies of single tokens (LOG.md).
Run:    python -m experiments.norm_residual_depth --sweep        (3 norms x 2 depths x 2 rates x 2 seeds)
Expect: pre-norm ahead, far so at the high rate; post-norm lost at 18 layers, its gradient largest in
        the last layer, pre-norm's in the first, as Xiong et al. derive; DeepNorm level with depth at
        the modest rate, its gradients equal, and lost at 18 layers at the high one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments.shared import small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.small_lm import Data, Recipe
from research.data.source import pretraining_batch
from research.models import decoder
from research.models.attention import Attention, even_head_size
from research.models.block import Block, deep_norm, deep_norm_init, post_norm, pre_norm
from research.models.decoder import Decoder, DecoderConfig
from research.models.init import Xavier
from research.models.layers import LayerNorm, Linear, Mlp
from research.models.position import Rope
from research.models.stack import Stack
from research.objectives import next_token
from research.runs import main, param, product, results

XAVIER = ((r".*/(attention|ffn)/\w+/kernel", Xavier()),)


@dataclasses.dataclass(frozen=True)
class Form:
    """Parts that a place of the norm needs: residual, rules of initialisation, a norm at the end."""

    residual: Callable = pre_norm
    rules: Callable[[int], tuple] | None = None
    final: bool = True

    def parts(self, layers: int) -> tuple[Callable, tuple]:
        if self.rules is None:
            return self.residual, XAVIER
        return self.residual(layers), self.rules(layers)


FORMS = {
    "post-norm": Form(post_norm, final=False),
    "pre-norm": Form(pre_norm),
    "DeepNorm": Form(deep_norm, deep_norm_init, final=False),
}
DEPTHS = {"6": 6, "18": 18}
RATES = {"5e-4": 5e-4, "2e-3": 2e-3}


@dataclasses.dataclass(frozen=True)
class Config:
    form: Form = FORMS["pre-norm"]
    layers: int = 6
    width: int = 64
    heads: int = 4
    lr: float = 5e-4
    recipe: Recipe = Recipe(steps=240, batch_size=8)
    seed: int = 0


def model_of(config: Config) -> DecoderConfig:
    residual, rules = config.form.parts(config.layers)
    size = even_head_size(config.width, config.heads)
    attention = Attention(config.heads, config.heads, size)
    block = Block(attention, Mlp(4 * config.width), LayerNorm(), residual)
    return DecoderConfig(
        vocab_size=config.recipe.vocab_size,
        width=config.width,
        stacks=(Stack(config.layers, (block,)),),
        max_length=512,
        position=Rope(),
        final_norm=LayerNorm() if config.form.final else None,
        head=Linear(config.recipe.vocab_size, ("embed", "vocab")),
        init_std=config.width**-0.5,
        init_rules=rules,
        embed_scale=config.width**0.5,
    )


def gradient_norms(config: Config, data: Data) -> dict[str, float]:
    """Of the first and the last layer's ffn/down matrix, at the start of training."""
    model, recipe = Decoder(model_of(config)), config.recipe
    params = decoder.init(model, jax.random.key(config.seed))
    batch = pretraining_batch(data.train, recipe.length, recipe.batch_size, config.seed, 0)
    found = jax.jit(jax.grad(lambda params: next_token(model)(params, None, batch, None)[0]))(
        params
    )
    down = found["stack_0"]["block_0"]["ffn"]["down"]["kernel"]
    norms = jnp.sqrt((down**2).sum((1, 2)))
    return {"gradient/first": float(norms[0]), "gradient/last": float(norms[-1])}


def run(config: Config, directory: Path) -> dict[str, float]:
    recipe = dataclasses.replace(config.recipe, lr=config.lr)
    data = small_lm.data(recipe)
    norms = gradient_norms(config, data)
    trained = small_lm.train(model_of(config), data, recipe, directory, config.seed)
    return trained.metrics() | norms


COLUMNS = {
    "held-out nats a token": "nll/128",
    "gradient, first layer": "gradient/first",
    "gradient, last layer": "gradient/last",
}


def table(rows: list[results.Row]) -> str:
    found = cells(rows, BASE, form=FORMS, layers=DEPTHS, lr=RATES)
    lines = [
        [*labels, *(group.statistic(metric) for metric in COLUMNS.values())]
        for labels, group in found.items()
    ]
    return markdown(["norm", "layers", "rate", *COLUMNS], lines)


def figure(rows: list[results.Row]) -> Figure:
    found = cells(rows, BASE, form=FORMS, layers=DEPTHS, lr=RATES)
    drawing = Figure(figsize=(7, 3.6), layout="constrained")
    panels = drawing.subplots(1, len(RATES), sharey=True)
    for axes, rate in zip(panels, RATES, strict=True):
        for form in FORMS:
            here = [(key, group) for key, group in found.items() if key[::2] == (form, rate)]
            points = [(int(depth), group.statistic("nll/128")) for (_, depth, _), group in here]
            depths, means = [depth for depth, _ in points], [s.mean for _, s in points]
            spread = [statistic.std or 0 for _, statistic in points]
            axes.errorbar(depths, means, yerr=spread, marker="o", capsize=3, label=form)
        axes.set(title=f"rate {rate}", xlabel="layers", xticks=list(DEPTHS.values()))
    panels[0].set(ylabel="held-out nats a token")
    panels[0].legend(frameon=False)
    return drawing


BASE = Config()
SWEEP = product(
    param("form", *FORMS.values()),
    param("layers", *DEPTHS.values()),
    param("lr", *RATES.values()),
    param("seed", 0, 1),
)
SMOKE = {"layers": 2, "width": 16, "heads": 2, "recipe": small_lm.SMOKE}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
