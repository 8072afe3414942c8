"""What does instruction tuning cost elsewhere?  Biderman et al. 2024, "LoRA learns less and forgets less".

arXiv:2405.09673, its plot of learning against forgetting, on a small real model:
SmolLM2-135M-Instruct learns to answer in Chinese, which it was hardly taught, with LoRA at two
rates or with all weights. Learning is the fall of the loss of held-out answers; forgetting is its
rise on English text that has nothing to do with them (Shakespeare, the King James Bible, an
encyclopedia), and an exam of English questions. Both are measured in the middle and at the end of
the same steps.

Differs from the paper: 135M parameters, not 7B; Chinese rows, not code and mathematics; thousands of
tokens, not billions, so that nothing converges; forgetting by likelihood, where the paper has
HellaSwag, ARC and WinoGrande; one rank, 16, on every matrix, at two rates. The base is the 4-bit release
made dense. One seed for time: a second would say how wide the points are (`--sweep --set seed=1`);
the exam's interval is wide, about 0.15 either way.
Run:    python -m experiments.catastrophic_probe --sweep      (4 runs, about 6 min on 2 idle cores)
Expect: not the paper's trade: after 16 steps nothing is forgotten. Whoever learns more of the answers makes
        the English texts likelier too, by 0.01 to 0.06 nats, all weights as LoRA. The exam does not move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.shared import sft, small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_instruct
from research import hub
from research.data import corpora, formats, packing
from research.data.rows import Rows
from research.evaluate import nll
from research.runs import chain, main, results
from research.tokenize import chat
from research.train import metrics
from research.types import Params


def plays() -> str:
    return "\n".join(corpora.shakespeare().values())


def bible() -> str:
    return "\n".join(verse.english for verse in corpora.verses())


GENERAL: dict[str, Callable[[], str]] = {"plays": plays, "bible": bible, "wiki": corpora.wiki}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA on every matrix of a block."""

    rank: int = 16
    alpha: float = 32.0


@dataclasses.dataclass(frozen=True)
class Config:
    """`adapter` None trains every weight; `steps` 0 measures the model as it is.

    A step sees batch_size packed rows of `length` tokens. `windows` of `length` tokens of each general
    text are read, evenly spaced; `measured` times in a run learning and forgetting are measured.
    """

    rows: Callable[[], Rows] = corpora.alpaca_zh
    adapter: Adapter | None = Adapter()
    lr: float = 5e-4
    warmup_steps: int = 2
    steps: int = 16
    batch_size: int = 1
    length: int = 512
    held_out: int = 16
    windows: int = 2
    exam: str = "quartz"
    questions: int = 40
    measured: int = 2
    seed: int = 0


Change = dict[str, Any]
METHODS: dict[str, Change] = {
    "LoRA, 5e-4": {"adapter": Adapter(), "lr": 5e-4},
    "LoRA, 2e-3": {"adapter": Adapter(), "lr": 2e-3},
    "all weights, 1e-4": {"adapter": None, "lr": 1e-4},
}


def run(config: Config, directory: Path) -> dict[str, float]:
    tuned = base = smollm2_instruct()
    encode = partial(chat.encode_chat, base.tokenizer)
    parts = sft.split(list(formats.conversations(config.rows())), config.held_out)
    train, held_out = (sft.packed(part, encode, config.length) for part in parts)
    texts = {name: windows(base, text(), config) for name, text in GENERAL.items()}
    if config.steps:
        tuned = sft.tune(
            base,
            *adapted(config, base.params),
            train,
            config,
            directory,
            eval_every=max(config.steps // config.measured, 1),
            evaluate=lambda pretrained: losses(pretrained, held_out, texts),
        )
        found = curve(directory)
    else:
        found = {f"0/{name}": value for name, value in losses(base, held_out, texts).items()}
    exam = sft.exam(tuned, config.exam, config.questions)
    low, high = exam.interval
    return found | {"exam": exam.value, "exam_low": low, "exam_high": high}


def windows(pretrained: hub.Pretrained, text: str, config: Config) -> packing.Table:
    """Evenly spaced windows of a text's tokens."""
    stream = small_lm.stream(pretrained.tokenizer, [text])
    count = packing.windows(len(stream), config.length)
    chosen = [i * count // config.windows for i in range(config.windows)]
    rows = [packing.stream_row(stream, i, config.length) for i in chosen]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def adapted(config: Config, params: Params) -> tuple[Params, Any]:
    if config.adapter is None:
        return params, r".*"
    return sft.with_lora(params, sft.LINEAR, config.adapter.rank, config.adapter.alpha, config.seed)


def losses(
    pretrained: hub.Pretrained, held_out: packing.Table, texts: dict[str, packing.Table]
) -> dict[str, float]:
    """Nats a token: of held-out answers, of each general text, and of all of that together."""
    model, params = pretrained.model, pretrained.params
    found = {
        name: nll.held_out(model, params, packing.batches(table, 2))
        for name, table in texts.items()
    }
    total = sum(found.values(), nll.Likelihood(0.0, 0))
    answers = sft.likelihood(pretrained, held_out, rows=2)
    each = {name: likelihood.per_token for name, likelihood in found.items()}
    return {"answers": answers.per_token, "general": total.per_token, **each}


def curve(directory: Path) -> dict[str, float]:
    """{"8/answers": ..., "16/answers": ...}: every evaluation of a training run, by its step."""
    rows = [r for r in metrics.read(directory / "metrics.jsonl") if r["split"] == "eval"]
    names = ("answers", "general", *GENERAL)
    return {f"{row['step']}/{name}": row[name] for row in rows for name in names}


Points = dict[int, dict[str, results.Statistic]]


def points(rows: list[results.Row]) -> dict[str, Points]:
    """{method: {step: {"learned", "forgotten" and the general texts: nats a token}}}, step 0 left out."""
    before, named = methods(rows)
    found: dict[str, Points] = {}
    for name, group in named.items():
        steps = sorted({int(m.split("/")[0]) for m in group.rows[0]["metrics"] if "/" in m})
        found[name] = {step: changes(before, group, step) for step in steps}
    return found


def methods(rows: list[results.Row]) -> tuple[results.Group, dict[str, results.Group]]:
    """(the model as it was, {method: its runs})."""
    values = {str(n): n for n in (0, BASE.steps)}
    adapters = {"LoRA": BASE.adapter, "all": None}
    rates = {f"{rate:g}": rate for rate in sorted({m["lr"] for m in METHODS.values()})}
    found = cells(rows, BASE, steps=values, adapter=adapters, lr=rates)
    named = {}
    for name, change in METHODS.items():
        key = (str(BASE.steps), "all" if change["adapter"] is None else "LoRA", f"{change['lr']:g}")
        if key in found:
            named[name] = found[key]
    return found["0", "LoRA", f"{BASE.lr:g}"], named


def changes(before: results.Group, group: results.Group, step: int) -> dict[str, results.Statistic]:
    """How much lower the answers' loss is than before, and how much higher that of the texts."""
    start = {name: before.statistic(f"0/{name}").mean for name in ("answers", "general", *GENERAL)}

    def change(name: str, sign: int) -> results.Statistic:
        values = [row["metrics"][f"{step}/{name}"] for row in group.rows]
        return results.summary([sign * (value - start[name]) for value in values])

    each = {name: change(name, 1) for name in GENERAL}
    return {"learned": change("answers", -1), "forgotten": change("general", 1), **each}


def table(rows: list[results.Row]) -> str:
    """A line for each method at each measured step."""
    before, named = methods(rows)
    heads = ["trained", "steps", "learned", "forgotten", *GENERAL, "exam"]
    start = [before.statistic(f"0/{name}") for name in ("answers", "general", *GENERAL)]
    lines = [["(before)", 0, *start, exam(before)]]
    for name, found in points(rows).items():
        for step, change in found.items():
            at_end = exam(named[name]) if step == BASE.steps else ""
            lines.append([name, step, *change.values(), at_end])
    return markdown(heads, lines) + (
        "\nNats a token. The first line has the losses themselves, of held-out answers and of general "
        "text; below it\nlearned is how far the first fell, forgotten how far the second rose, all and "
        "by text.\n"
    )


def exam(group: results.Group) -> str:
    value, low, high = (group.statistic(m).mean for m in ("exam", "exam_low", "exam_high"))
    return f"{value:.2f} ({low:.2f}–{high:.2f})"


def figure(rows: list[results.Row]) -> Figure:
    """Forgetting against learning: a line a method, from the start through its measured steps."""
    drawing = Figure(figsize=(6, 4), layout="constrained")
    axes = drawing.subplots()
    for marker, (name, found) in zip("osDv", points(rows).items(), strict=False):
        learned = [0.0, *(point["learned"].mean for point in found.values())]
        forgotten = [0.0, *(point["forgotten"].mean for point in found.values())]
        look = {"marker": marker, "linestyle": "--" if "all" in name else "-"}
        axes.plot(learned, forgotten, label=name, markerfacecolor="none", **look)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        xlabel="learned: fall of the loss of held-out answers, nats a token",
        ylabel="forgotten: rise of the loss\nof general text, nats a token",
    )
    axes.legend(frameon=False)
    return drawing


BASE = Config()
SWEEP = chain([{"steps": 0}], list(METHODS.values()))
SMOKE = {
    "steps": 2,
    "warmup_steps": 1,
    "length": 64,
    "held_out": 4,
    "windows": 1,
    "questions": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
