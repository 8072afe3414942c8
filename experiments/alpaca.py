"""Instruction tuning as Alpaca did it, in two languages: Taori et al. 2023, on a small real model.

LoRA on every matrix of SmolLM2-135M-Instruct, on English rows, Chinese rows, or both in the same number
of steps. Measured in both languages on each: likelihood of held-out answers, greedy answers to
held-out questions against their references, and a synthetic probe of instructions with rules.

Differs from Alpaca: 135M parameters that are instruction-tuned in English already, not LLaMA-7B
pretrained; LoRA, not all weights; about 1,000 rows a language with answers of a later model, not
52,000 of text-davinci-003; the model's own chat template, not Alpaca's prompt. SmolLM2 was hardly
taught Chinese, and its tokenizer cuts most Chinese characters into bytes: nats a token are easy
there, so bits a byte are what compares languages. One of the 40 English rows held out stands among
the training rows too. One seed for time: a second would say how much of a difference below a few
hundredths of a nat is chance (`--sweep --set seed=1`).
Run:    python -m experiments.alpaca --sweep             (4 runs, about 12 min on 2 idle cores)
        python -m scripts.samples alpaca                 (what each model said to the probe)
Expect: each language's rows help it most, and the other by more than half as much (English) or a
        third (Chinese): 0.10, 0.06 and 0.21, 0.08 nats a token. Both together lose 0.01 of either.
        Of 24 Chinese questions 12 are answered in Chinese before, 18, 24 and 23 after. ROUGE-L and
        chrF rise in Chinese and stay or fall in English; the probe's 24 instructions are too few
        to tell models apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from experiments.shared import probe, sft
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_instruct
from experiments.shared.samples import side_by_side
from research import hub
from research.data import corpora, formats, packing
from research.data.rows import Rows
from research.evaluate import generation
from research.runs import main, param, results
from research.tokenize import chat

Load = Callable[[], Rows]

LANGUAGES: dict[str, Load] = {"en": corpora.alpaca_en, "zh": corpora.alpaca_zh}
NAMES = {"en": "English", "zh": "Chinese"}
SPLITTERS = {"en": generation.words, "zh": generation.characters}
SPEAKS = {"en": probe.is_english, "zh": probe.is_chinese}
TRAINED: dict[str, tuple[Load, ...]] = {
    "before": (),
    "English": (corpora.alpaca_en,),
    "Chinese": (corpora.alpaca_zh,),
    "both": (corpora.alpaca_en, corpora.alpaca_zh),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """`train_on` () measures the model as it is. A step sees batch_size packed rows of `length`.

    held_out       rows of each language
    answers        questions of each language to be answered, of `question_tokens` at most; an answer
                   has `answer_tokens` at most, and its reference is cut there too
    """

    train_on: tuple[Load, ...] = (corpora.alpaca_en,)
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    lr: float = 1e-3
    warmup_steps: int = 3
    steps: int = 30
    batch_size: int = 2
    length: int = 512
    held_out: int = 40
    answers: int = 24
    question_tokens: int = 160
    answer_tokens: int = 96
    probe_tokens: int = 64
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Of one language: packed rows, and questions with their references."""

    table: packing.Table
    questions: list[str]
    references: list[str]


def run(config: Config, directory: Path) -> dict[str, float]:
    tuned = base = smollm2_instruct()
    encode = partial(chat.encode_chat, base.tokenizer)
    if config.train_on:
        parts = [part for rows in config.train_on for part in split(rows, config)[0]]
        table = sft.packed(parts, encode, config.length)
        params, rule = sft.with_lora(
            base.params, sft.LINEAR, config.rank, config.alpha, config.seed, config.dropout
        )
        tuned = sft.tune(base, params, rule, table, config, directory)
    found = {}
    for language, rows in LANGUAGES.items():
        print(f"measuring {language}", flush=True)
        held_out = prepare(config, base, split(rows, config)[1])
        found |= {
            f"{language}/{k}": v for k, v in measure(tuned, config, held_out, language).items()
        }
    said = sft.answer(tuned, [item.prompt for item in probe.ITEMS], config.probe_tokens)
    (directory / "probe.json").write_text(json.dumps(said, ensure_ascii=False, indent=1))
    for language, share in probe.shares(said).items():
        found |= {f"{language}/followed": share.correct, f"{language}/asked": share.total}
    return found


def split(rows: Load, config: Config) -> tuple[list[sft.Conversation], list[sft.Conversation]]:
    return sft.split(list(formats.conversations(rows())), config.held_out)


def prepare(config: Config, pretrained: hub.Pretrained, rows: list[sft.Conversation]) -> HeldOut:
    """Held-out rows packed, and the first of them with a short question."""
    tokenizer = pretrained.tokenizer
    pairs = [(messages[0]["content"], messages[-1]["content"]) for _, messages in rows]
    short = [pair for pair in pairs if len(tokenizer.encode(pair[0])) <= config.question_tokens]
    questions, references = zip(*short[: config.answers], strict=True)
    cut = [tokenizer.decode(tokenizer.encode(r)[: config.answer_tokens]) for r in references]
    table = sft.packed(rows, partial(chat.encode_chat, tokenizer), config.length)
    return HeldOut(table, list(questions), cut)


def measure(
    pretrained: hub.Pretrained, config: Config, held_out: HeldOut, language: str
) -> dict[str, float]:
    """Likelihood of the held-out answers; what the model itself says, against them."""
    likelihood = sft.likelihood(pretrained, held_out.table, config.batch_size)
    said = sft.answer(pretrained, held_out.questions, config.answer_tokens)
    references = [[reference] for reference in held_out.references]
    return {
        "nll": likelihood.per_token,
        "bits_per_byte": likelihood.bits_per_byte,
        "tokens": likelihood.tokens,
        "rouge_l": generation.rouge_l(said, references, SPLITTERS[language]),
        "chrf": generation.chrf(said, references),
        "in_language": sum(map(SPEAKS[language], said)) / len(said),
        "answers": len(said),
    }


def variants(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, train_on=TRAINED).items()}


def table(rows: list[results.Row]) -> str:
    """A line for what each model was trained on, in each language."""
    heads = ["language", "trained on", "nats a token", "bits a byte", "ROUGE-L", "chrF"]
    heads += ["answers in the language", "probe"]
    measures = ("nll", "bits_per_byte", "rouge_l", "chrf", "in_language")
    lines = []
    for language, name in NAMES.items():
        for trained, group in variants(rows).items():
            scores = [group.statistic(f"{language}/{measure}") for measure in measures]
            kept, asked = (group.statistic(f"{language}/{m}").mean for m in ("followed", "asked"))
            lines.append([name, trained, *scores, f"{kept:g} of {asked:g}"])
    return markdown(heads, lines) + (
        "\nNats and bits of held-out answers; ROUGE-L (of words, or of Chinese characters) and chrF of "
        "greedy answers\nto held-out questions, both cut to their first tokens; probe: instructions of "
        "a synthetic set that were followed.\n"
    )


def figure(rows: list[results.Row]) -> Figure:
    """Bits a byte of held-out answers, and the share of the probe's instructions followed."""
    found = variants(rows)
    drawing = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, title, value in zip(
        drawing.subplots(1, 2),
        ("held-out answers, bits a byte", "instructions of the probe followed"),
        (bits, share),
        strict=True,
    ):
        for number, language in enumerate(NAMES):
            heights = [value(group, language) for group in found.values()]
            places = [place + 0.4 * number for place in range(len(found))]
            bars = axes.bar(places, heights, 0.38, label=NAMES[language])
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.set_xticks([place + 0.2 for place in range(len(found))], found)
        axes.set(title=title, xlabel="trained on")
        axes.margins(y=0.2)
    drawing.axes[0].legend(frameon=False, ncols=2)
    return drawing


def bits(group: results.Group, language: str) -> float:
    return group.statistic(f"{language}/bits_per_byte").mean


def share(group: results.Group, language: str) -> float:
    return group.statistic(f"{language}/followed").mean / group.statistic(f"{language}/asked").mean


def samples(rows: list[results.Row], runs: Path) -> str:
    """The answers of every model to the probe, and whether the rule let each pass."""
    said = {}
    for name, group in variants(rows).items():
        said[name] = json.loads((runs / group.rows[0]["id"] / "probe.json").read_text())
    marks = {
        name: ["followed" if ok else "not" for ok in probe.followed(answers)]
        for name, answers in said.items()
    }
    intro = (
        "Greedy answers to the synthetic probe of `experiments/shared/probe.py`, cut off at "
        f"{BASE.probe_tokens} tokens, before and after\ntraining; the rule sees the form of an answer "
        "only. The models are small, and what they say is often wrong.\n\n"
    )
    return intro + side_by_side([item.prompt for item in probe.ITEMS], said, marks)


BASE = Config()
SWEEP = param("train_on", *TRAINED.values())
SMOKE = {
    "steps": 2,
    "warmup_steps": 1,
    "rank": 2,
    "batch_size": 1,
    "length": 64,
    "held_out": 3,
    "answers": 2,
    "question_tokens": 512,
    "answer_tokens": 4,
    "probe_tokens": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
