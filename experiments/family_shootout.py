"""Which family's parts pay, at one size?  GPT-2, LLaMA, ChatGLM2, Baichuan 2-13B and Qwen2, small.

    GPT-2           LayerNorm, learned positions, GELU, biases everywhere, tied head (Radford et al. 2019)
    LLaMA           RMSNorm, RoPE, SwiGLU, no biases (Touvron et al. 2023, arXiv:2302.13971)
    ChatGLM2        as LLaMA, but two key/value heads, biases on q, k and v, and RoPE on half of each
                    head's features (GLM Team 2024, arXiv:2406.12793)
    Baichuan 2-13B  as LLaMA, but ALiBi and a head of normalised columns (Yang et al. 2023,
                    arXiv:2309.10305). Not Baichuan-13B: that is LLaMA with ALiBi and nothing else, which
                    position_ablation measures
    Qwen2           as LLaMA, but two key/value heads, biases on q, k and v, theta 1e6, and the tied
                    head of its small sizes (Yang et al. 2024, arXiv:2407.10671)

All are trained alike from nothing on Shakespeare. What a family saves in heads, or by tying its
head, it has in the feed-forward: the counts of parameters are within 1 % of each other.

Differs from the papers: a million parameters; one tokenizer, vocabulary and learning rate for all;
no dropout (GPT-2) and no max-z loss (Baichuan 2). Learned positions have no row beyond 128 and are
tested there only. Speeds are of this machine at that time.
Run:    python -m experiments.family_shootout --sweep        (5 families x 2 seeds)
Expect: LLaMA, ChatGLM2 and Qwen2 level at 128, GPT-2 a tenth behind; Baichuan 2 far ahead, by a head
        that does not begin near zero and would lead less in a long training (LOG.md). At 512 ALiBi
        no worse, rotary a little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.shared import small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.decoding import decoding_speed
from experiments.shared.lengths import draw, scores
from experiments.shared.small_lm import Recipe, Trained
from research.models import decoder
from research.models.decoder import Decoder, DecoderConfig
from research.models.families.baichuan import baichuan, fold_head
from research.models.families.glm import glm
from research.models.families.gpt import gpt
from research.models.families.llama import llama
from research.models.families.qwen import qwen
from research.models.layers import NormHead
from research.models.position import Alibi
from research.runs import main, param, product, results
from research.types import Params

NO_DROPOUT = {"dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
MULTIPLE = 8  # of a feed-forward's width


def gpt2(config: Config, ffn: int) -> DecoderConfig:
    return gpt(*config.sizes, config.recipe.length, ffn=ffn, **NO_DROPOUT)


def llama2(config: Config, ffn: int) -> DecoderConfig:
    return llama(*config.sizes, config.heads, ffn, max_length=config.recipe.length)


def chatglm2(config: Config, ffn: int) -> DecoderConfig:
    return glm(*config.sizes, config.kv_heads, ffn, max_length=config.recipe.length)


def baichuan2(config: Config, ffn: int) -> DecoderConfig:
    length = config.recipe.length
    return baichuan(*config.sizes, ffn, norm_head=True, position=Alibi(), max_length=length)


def qwen2(config: Config, ffn: int) -> DecoderConfig:
    return qwen(*config.sizes, config.kv_heads, ffn, tied=True, max_length=config.recipe.length)


FAMILIES: dict[str, Callable[[Config, int], DecoderConfig]] = {
    "GPT-2": gpt2,
    "LLaMA": llama2,
    "ChatGLM2": chatglm2,
    "Baichuan 2-13B": baichuan2,
    "Qwen2": qwen2,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """`kv_heads`: where they are fewer. `ffn`: LLaMA's width; the others' follow from its count of
    parameters. `prompt` and `answer`: tokens of the timed decoding, together no more than were
    trained on; `calls`: how often it is timed."""

    family: Callable[..., DecoderConfig] = llama2
    layers: int = 4
    width: int = 128
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 344
    recipe: Recipe = Recipe(length=128, steps=150, eval_lengths=(128, 256, 512))
    prompt: int = 32
    answer: int = 96
    calls: int = 5
    seed: int = 0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.recipe.vocab_size, self.layers, self.width, self.heads


def equal_ffn(config: Config) -> int:
    """The width, a multiple of 8, with which the family comes nearest to LLaMA's parameters.

    A count of parameters is linear in the width of the feed-forward.
    """

    def count(family: Callable, ffn: int) -> int:
        return decoder.count_parameters(Decoder(family(config, ffn)))

    least = count(config.family, MULTIPLE)
    step = count(config.family, 2 * MULTIPLE) - least
    missing = count(llama2, config.ffn) - least
    return MULTIPLE * (1 + max(0, round(missing / step)))


def for_decoding(trained: Trained) -> tuple[Decoder, Params]:
    """The model with its normalised head folded into a plain one, where it has one."""
    config, params = trained.model.config, trained.params
    if isinstance(config.head, NormHead):
        config, params = fold_head(config, params)
    return Decoder(config), params


def run(config: Config, directory: Path) -> dict[str, float]:
    data, ffn = small_lm.data(config.recipe), equal_ffn(config)
    model = config.family(config, ffn)
    trained = small_lm.train(model, data, config.recipe, directory, config.seed)
    timed = (config.prompt, config.answer, config.calls)
    speed = decoding_speed(*for_decoding(trained), data, *timed)
    return trained.metrics() | {"ffn": ffn, "decode_tokens_per_s": speed}


SPEEDS = {"training": "train_tokens_per_s", "decoding": "decode_tokens_per_s"}


def ratio(group: results.Group, base: results.Group, metric: str) -> results.Statistic | str:
    """The metric over that of `base` with the same seed; "–" when no seed is in both."""
    own, theirs = (
        {row["config"]["seed"]: results.metrics(row)[metric] for row in each.rows}
        for each in (group, base)
    )
    shared = sorted(own.keys() & theirs.keys())
    return results.summary([own[seed] / theirs[seed] for seed in shared]) if shared else "–"


def by_family(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, family=FAMILIES).items()}


def table(rows: list[results.Row]) -> str:
    found, lengths, lines = by_family(rows), BASE.recipe.eval_lengths, []
    base = found.get("LLaMA")
    for name, group in found.items():
        sizes = [f"{group.statistic(metric).mean:,.0f}" for metric in ("parameters", "ffn")]
        reached = scores(group, lengths)
        losses = [reached.get(length, "–") for length in lengths]
        speeds = [ratio(group, base, each) if base else "–" for each in SPEEDS.values()]
        lines.append([name, *sizes, *losses, *speeds])
    heads = ["family", "parameters", "feed-forward", *(f"{n} tokens" for n in lengths), *SPEEDS]
    return markdown(heads, lines) + note(base)


def note(base: results.Group | None) -> str:
    said = f"\nHeld-out nats a token; trained on {BASE.recipe.length} tokens."
    if base is None:
        return said + "\n"
    speeds = [f"{base.statistic(metric)} in {name}" for name, metric in SPEEDS.items()]
    return f"{said} Speeds over LLaMA's, tokens/s: {', '.join(speeds)}.\n"


def figure(rows: list[results.Row]) -> Figure:
    """Loss by the length of the window; speeds over LLaMA's, where it was run."""
    found = by_family(rows)
    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    draw(left, found, BASE.recipe.eval_lengths)
    if "LLaMA" in found:
        draw_speeds(right, found)
    return drawing


def draw_speeds(axes: Axes, found: dict[str, results.Group]) -> None:
    for number, (label, metric) in enumerate(SPEEDS.items()):
        ratios = [ratio(group, found["LLaMA"], metric) for group in found.values()]
        shown = [(place, r) for place, r in enumerate(ratios) if r != "–"]
        places = [place + 0.4 * (number - 0.5) for place, _ in shown]
        spread = [r.std or 0 for _, r in shown]
        axes.barh(places, [r.mean for _, r in shown], 0.38, xerr=spread, label=label)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second over LLaMA's")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2, frameon=False)


BASE = Config()
SWEEP = product(param("family", *FAMILIES.values()), param("seed", 0, 1))
SMOKE = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "ffn": 24,
    "recipe": small_lm.SMOKE,
    "prompt": 8,
    "answer": 4,
    "calls": 1,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
