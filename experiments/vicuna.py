"""Vicuna's objective: conversations of many turns, loss on what the assistant says and on nothing else.

Chiang et al. 2023 (Vicuna, a report and its code, FastChat) against a loss on every token, which Shi
et al. 2024 (arXiv:2405.14394) found to help where answers are short and rows few. LoRA on
SmolLM2-135M-Instruct, in Vicuna v1.1's layout ("USER: ... ASSISTANT: ...", the end of a turn after each
answer), which the model has not seen before. Measured on held-out
conversations before and after: likelihood of the first answer, the second, ..., and of what is not
answers; a conversation of three turns to read.

Differs from Vicuna: 135M parameters, not LLaMA-7B and 13B; LoRA; 300 rows of conversations with tools
(Glaive), not 70,000 of ShareGPT, cut at 1,024 tokens, not 2,048. Glaive repeats itself: nothing that
begins as a held-out conversation is trained on. The layout has two speakers:
what a tool returns stands as the user's turn, a call of a function as the assistant's, and the list of
tools takes the place of the system prompt. One seed for time: two would tell differences of a few
hundredths of a nat from chance (`--sweep --set seed=1`).
Run:    python -m experiments.vicuna --sweep             (3 runs, about 9 min on 2 idle cores)
        python -m scripts.samples vicuna                 (the same conversation with each model)
Expect: answers fall from 1.24 nats a token to 1.04, the first two by 0.23 and 0.27, later ones by 0.08
        to 0.15. Loss on every token is 0.01 to 0.03 behind at each answer (one seed), and learns the
        rest too, 2.05 to 0.96. Said aloud, neither keeps to the matter for three turns.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.shared import sft
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_instruct
from experiments.shared.samples import side_by_side
from research import hub
from research.data import corpora, formats
from research.evaluate import nll
from research.runs import chain, main, results
from research.tokenize import layout
from research.tokenize.formats import VICUNA
from research.tokenize.tokenizer import Tokenizer

Encoded = tuple[np.ndarray, np.ndarray]
Supervise = Callable[[Tokenizer, Sequence[dict[str, Any]]], Encoded]

# Written for this experiment; no row of the data.
ASKED = (
    "Hello! I am planning a walk in the mountains tomorrow. What should I take with me?",
    "It may rain in the afternoon. Does that change anything?",
    "Thank you. Please sum up your advice in one sentence.",
)


def answers(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> Encoded:
    """(ids, mask) in Vicuna's layout: the mask is 1 on the answers and their ends."""
    return layout.encode(tokenizer, VICUNA, two_speakers(messages))


def every_token(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> Encoded:
    """The same ids, all of them to be learned."""
    ids, mask = answers(tokenizer, messages)
    return ids, np.ones_like(mask)


LOSSES: dict[str, Supervise] = {"answers only": answers, "every token": every_token}


@dataclasses.dataclass(frozen=True)
class Config:
    """`steps` 0 measures the model as it is. A step sees batch_size packed rows of `length` tokens.

    held_out      conversations of at least two answers, cut at `length` tokens too
    turns         answers beyond this one are counted with it
    asked         how many of the questions ASKED the model is asked at the end
    """

    loss: Supervise = answers
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    lr: float = 1e-3
    warmup_steps: int = 3
    steps: int = 24
    batch_size: int = 1
    length: int = 1024
    held_out: int = 32
    turns: int = 5
    asked: int = len(ASKED)
    answer_tokens: int = 80
    seed: int = 0


def two_speakers(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What tools say stands as the user's turn: Vicuna's layout knows no third."""
    return [m | {"role": "user"} if m["role"] == "tool" else m for m in messages]


def conversations() -> list[sft.Conversation]:
    """The rows that have at least two answers."""
    rows = formats.conversations(corpora.glaive_en())
    return [row for row in rows if sum(m["role"] == "assistant" for m in row[1]) > 1]


def first_question(conversation: sft.Conversation) -> str:
    """What the user says first: Glaive's rows repeat whole conversations under other system prompts."""
    return next(m["content"] for m in conversation[1] if m["role"] == "user")


def run(config: Config, directory: Path) -> dict[str, float]:
    tuned = base = smollm2_instruct()
    train, held_out = sft.split(conversations(), config.held_out, first_question)
    if config.steps:
        table = sft.packed(train, partial(config.loss, base.tokenizer), config.length)
        params, rule = sft.with_lora(
            base.params, sft.LINEAR, config.rank, config.alpha, config.seed, config.dropout
        )
        tuned = sft.tune(base, params, rule, table, config, directory)
    print("measuring", flush=True)
    said = talk(tuned, ASKED[: config.asked], config.answer_tokens)
    (directory / "talk.json").write_text(json.dumps(said, ensure_ascii=False, indent=1))
    return by_turn(tuned, config, held_out)


def by_turn(
    pretrained: hub.Pretrained, config: Config, held_out: list[sft.Conversation]
) -> dict[str, float]:
    """Nats a token of each answer, all answers, and all that is not an answer, and their tokens."""
    encoded = [answers(pretrained.tokenizer, messages) for _, messages in held_out]
    ids = [row[: config.length].tolist() for row, _ in encoded]
    turns = [turn_numbers(mask[: config.length], config.turns) for _, mask in encoded]
    log_probs = nll.continuation_log_probs(
        pretrained.model, pretrained.params, ids, [1] * len(ids), batch_size=2
    )
    loss, turn = -np.concatenate(log_probs), np.concatenate([row[1:] for row in turns])
    chosen = {f"turn_{n}": turn == n for n in range(1, config.turns + 1)}
    chosen |= {"answers": turn > 0, "rest": turn == 0}
    found = {}
    for name, where in chosen.items():
        if where.any():
            found[f"nll/{name}"] = float(loss[where].mean(dtype=np.float64))
        found[f"tokens/{name}"] = int(where.sum())
    return found


def turn_numbers(mask: np.ndarray, most: int) -> np.ndarray:
    """[T]: 1 on the first answer of a mask [T], 2 on the second, ..., at most `most`; 0 elsewhere."""
    inside = mask > 0
    begins = inside & ~np.concatenate([[False], inside[:-1]])
    return np.where(inside, np.minimum(np.cumsum(begins), most), 0)


def talk(pretrained: hub.Pretrained, questions: Sequence[str], limit: int) -> list[str]:
    """Greedy answers, one after another, each knowing what was said before."""
    messages, said = [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = layout.encode(pretrained.tokenizer, VICUNA, messages)[0].tolist()
        said += [text.strip() for text in sft.greedy(pretrained, [prompt], limit)]
        messages.append({"role": "assistant", "content": said[-1]})
    return said


def variants(rows: list[results.Row]) -> dict[str, results.Group]:
    """{"before": ..., and by the loss that was trained on}."""
    found = cells(rows, BASE, steps={"before": 0, "after": BASE.steps}, loss=LOSSES)
    return {loss if time == "after" else "before": group for (time, loss), group in found.items()}


def measures(found: dict[str, results.Group]) -> list[str]:
    """turn_1, ... as far as there are some, answers, rest."""
    names = [f"turn_{n}" for n in range(1, BASE.turns + 1)] + ["answers", "rest"]
    tokens = next(iter(found.values()))
    return [name for name in names if tokens.statistic(f"tokens/{name}").mean]


def table(rows: list[results.Row]) -> str:
    """A line a model, a column an answer."""
    found = variants(rows)
    names = measures(found)
    lines = [
        [label, *(group.statistic(f"nll/{name}") for name in names)]
        for label, group in found.items()
    ]
    count = next(iter(found.values()))
    lines.append(["tokens", *(f"{count.statistic(f'tokens/{n}').mean:g}" for n in names)])
    heads = [name.replace("turn_", "answer ") for name in names]
    last = f"answer {BASE.turns}"
    heads = ["loss on", *(f"{h} and later" if h == last else h for h in heads)]
    return markdown(heads, lines) + (
        "\nNats a token of held-out conversations, in Vicuna's layout; rest: all that is not an "
        "answer.\n"
    )


def figure(rows: list[results.Row]) -> Figure:
    """Nats a token by the number of the answer."""
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    found = variants(rows)
    for marker, (label, group) in zip("os^", found.items(), strict=False):
        turns = [int(n.removeprefix("turn_")) for n in measures(found) if n.startswith("turn_")]
        losses = [group.statistic(f"nll/turn_{n}").mean for n in turns]
        axes.plot(turns, losses, marker=marker, markerfacecolor="none", label=label)
        axes.set_xticks(turns, [f"{n}+" if n == BASE.turns else n for n in turns])
    axes.set(xlabel="answer of a conversation", ylabel="nats a token, held out")
    axes.legend(frameon=False, title="loss on")
    return drawing


def samples(rows: list[results.Row], runs: Path) -> str:
    """One conversation with each model."""
    said = {
        name: json.loads((runs / group.rows[0]["id"] / "talk.json").read_text())
        for name, group in variants(rows).items()
    }
    numbers = {name: [f"answer {n}" for n in range(1, len(ASKED) + 1)] for name in said}
    intro = (
        "The same three questions, in Vicuna's layout, to the model before and after training with the "
        "loss on the\nanswers only and on every token. Each hears its own earlier answers; greedy, cut "
        f"off at {BASE.answer_tokens} tokens.\n\n"
    )
    return intro + side_by_side(ASKED, said, numbers)


BASE = Config()
SWEEP = chain([{"steps": 0}], [{}], [{"loss": every_token}])
SMOKE = {
    "steps": 2,
    "warmup_steps": 1,
    "rank": 2,
    "length": 128,
    "held_out": 2,
    "turns": 2,
    "asked": 1,
    "answer_tokens": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
