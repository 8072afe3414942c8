"""What do cheaper kinds of attention cost in likelihood?  One small decoder, six kinds.

Multi-head, grouped-query (Ainslie et al. 2023, arXiv:2305.13245), multi-query (Shazeer 2019,
arXiv:1911.02150), a sliding window with a rolling cache (Jiang et al. 2023, arXiv:2310.06825),
windowed and full layers in turn (Child et al. 2019, arXiv:1904.10509; GPT-3), and linear attention
(Katharopoulos et al. 2020, arXiv:2006.16236), each trained from nothing on Shakespeare.

Differs from the papers: a million parameters; fewer key/value heads are not paid back in width, so
those models are smaller. Speeds are of this machine at that time.
Run:    python -m experiments.attention_variants --sweep        (6 variants x 2 seeds)
Expect: losses within a tenth of each other, the linear form ahead by two tenths: models trained so
        briefly gain from averages of the past, and the papers' order, linear behind, wants more
        training. Caches 4 and 8 times smaller with grouped and one head, of constant size with a
        window and with linear attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from experiments.shared import small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.decoding import decoding_speed
from experiments.shared.small_lm import Recipe
from research.models import decoder
from research.models.attention import Attention, even_head_size
from research.models.decoder import Decoder, DecoderConfig
from research.models.families.llama import llama
from research.models.linear_attention import LinearAttention
from research.models.sinks import StreamingAttention
from research.models.stack import Stack
from research.runs import main, param, product, results

Attentions = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """`window` in tokens, `grouped` key/value heads of the grouped variant."""

    layers: int = 4
    width: int = 128
    heads: int = 8
    ffn: int = 344
    window: int = 64
    grouped: int = 2

    @property
    def head(self) -> tuple[int, int]:
        return self.heads, even_head_size(self.width, self.heads)


def multi_head(sizes: Sizes) -> Attentions:
    heads, size = sizes.head
    return (Attention(heads, heads, size),)


def grouped_query(sizes: Sizes) -> Attentions:
    heads, size = sizes.head
    return (Attention(heads, sizes.grouped, size),)


def multi_query(sizes: Sizes) -> Attentions:
    heads, size = sizes.head
    return (Attention(heads, 1, size),)


def sliding(sizes: Sizes) -> Attentions:
    heads, size = sizes.head
    return (StreamingAttention(heads, heads, size, window=sizes.window),)


def alternating(sizes: Sizes) -> Attentions:
    return (*sliding(sizes), *multi_head(sizes))


def linear(sizes: Sizes) -> Attentions:
    heads, size = sizes.head
    return (LinearAttention(heads, heads, size),)


VARIANTS: dict[str, Callable[[Sizes], Attentions]] = {
    "multi-head": multi_head,
    "grouped-query": grouped_query,
    "multi-query": multi_query,
    "sliding window": sliding,
    "alternating": alternating,
    "linear": linear,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """`cache_length`: of which the bytes are counted; `prompt` and `answer`: of the timed decoding."""

    variant: Callable[[Sizes], Attentions] = multi_head
    sizes: Sizes = Sizes()
    recipe: Recipe = Recipe(length=256, batch_size=8, steps=100, eval_lengths=(256,))
    cache_length: int = 2048
    prompt: int = 200
    answer: int = 128
    seed: int = 0


def model_of(config: Config) -> DecoderConfig:
    """A LLaMA with the variant's attentions in turn through its layers."""
    sizes, attentions = config.sizes, config.variant(config.sizes)
    base = llama(
        config.recipe.vocab_size,
        sizes.layers,
        sizes.width,
        sizes.heads,
        sizes.heads,
        sizes.ffn,
        max_length=config.cache_length,
        tied=True,
    )
    (block,) = base.stacks[0].pattern
    pattern = tuple(block.clone(attention=attention) for attention in attentions)
    stacks = (Stack(sizes.layers // len(pattern), pattern),)
    return dataclasses.replace(base, stacks=stacks)


def cache_bytes(model: Decoder, length: int) -> int:
    """What one row's layers keep when `length` tokens have been read."""
    cache = decoder.empty_cache(model, 1, length)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))


def run(config: Config, directory: Path) -> dict[str, float]:
    data = small_lm.data(config.recipe)
    trained = small_lm.train(model_of(config), data, config.recipe, directory, config.seed)
    speed = decoding_speed(trained.model, trained.params, data, config.prompt, config.answer)
    size = cache_bytes(trained.model, config.cache_length)
    return trained.metrics() | {"cache_bytes": size, "decode_tokens_per_s": speed}


COLUMNS = {
    "held-out nats a token": "nll/256",
    "parameters": "parameters",
    "cache, bytes": "cache_bytes",
    "training, tokens/s": "train_tokens_per_s",
    "decoding, tokens/s": "decode_tokens_per_s",
}


def table(rows: list[results.Row]) -> str:
    found = cells(rows, BASE, variant=VARIANTS)
    lines = [
        [name, *(group.statistic(metric) for metric in COLUMNS.values())]
        for (name,), group in found.items()
    ]
    note = f"\nThe cache is one row's at {BASE.cache_length} tokens, in float32.\n"
    return markdown(["attention", *COLUMNS], lines) + note


def figure(rows: list[results.Row]) -> Figure:
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    for (name,), group in cells(rows, BASE, variant=VARIANTS).items():
        loss, size = group.statistic("nll/256"), group.statistic("cache_bytes").mean
        axes.errorbar([size], [loss.mean], yerr=[loss.std or 0], marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="bytes of cache for one row", ylabel="held-out nats a token")
    axes.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = product(param("variant", *VARIANTS.values()), param("seed", 0, 1))
SMOKE = {
    "variant": alternating,
    "sizes": Sizes(2, 16, 2, 24, window=8, grouped=1),
    "recipe": small_lm.SMOKE,
    "cache_length": 64,
    "prompt": 12,
    "answer": 4,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
