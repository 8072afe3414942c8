"""Instruction tuning of a real model on real rows: SmolLM2-135M-Instruct, LoRA or all of it.

The base is the 4-bit (Q4_1) release made dense: its dequantized weights are the reference here.
1,000 Alpaca rows, of which some are held out, go through the model's chat template; loss falls on
the assistant's tokens only; rows are packed. Measured before and after: likelihood of held-out
answers, an exam the rows do not teach (has anything been forgotten?), and answers to read.

Run:    python -m experiments.sft_smollm2 --sweep      (LoRA, and all weights)
Expect: held-out NLL falls by a few hundredths to tenths of a nat; the exam stays within its interval.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments.shared import sft
from experiments.shared.first_layers import smollm2_instruct
from research import hub
from research.data import corpora, formats, packing, source
from research.data.rows import Rows
from research.objectives import next_token
from research.runs import chain, main
from research.tokenize import chat
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Params


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA on the matrices whose paths `targets` matches."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: str = r"stack_0/.*/kernel"


@dataclasses.dataclass(frozen=True)
class Config:
    """`adapter` None trains every weight. A step sees batch_size packed rows of `length` tokens."""

    rows: Callable[[], Rows] = corpora.alpaca_en
    adapter: Adapter | None = Adapter()
    lr: float = 3e-4
    warmup_steps: int = 6
    steps: int = 80
    batch_size: int = 2
    length: int = 512
    accumulate: int = 1
    held_out: int = 80
    exam: str = "quartz"
    questions: int = 60
    answers: int = 6
    answer_tokens: int = 96
    eval_every: int | None = 40
    save_every: int = 10
    seed: int = 0


def split(config: Config, tokenizer: Any) -> tuple[packing.Table, packing.Table, list[str]]:
    """Training rows packed, held-out rows packed, and the first held-out questions."""
    encode = partial(chat.encode_chat, tokenizer)
    parts = sft.split(list(formats.conversations(config.rows())), config.held_out)
    train, held_out = (sft.packed(part, encode, config.length) for part in parts)
    asked = [messages[0]["content"] for _, messages in parts[1][: config.answers]]
    return train, held_out, asked


def measure(
    pretrained: hub.Pretrained, config: Config, held_out: packing.Table
) -> dict[str, float]:
    """Likelihood of the held-out answers, and the exam."""
    exam = sft.exam(pretrained, config.exam, config.questions)
    low, high = exam.interval
    name = f"{config.exam}_accuracy"
    found = likelihood(pretrained, config, held_out)
    return found | {name: exam.value, f"{name}_low": low, f"{name}_high": high}


def likelihood(
    pretrained: hub.Pretrained, config: Config, held_out: packing.Table
) -> dict[str, float]:
    found = sft.likelihood(pretrained, held_out, config.batch_size)
    return {"nll": found.per_token, "perplexity": found.perplexity}


def adapted(config: Config, params: Params) -> tuple[Params, Any]:
    """Parameters to train, and the rule that says which of them do."""
    if config.adapter is None:
        return params, r".*"
    a = config.adapter
    return sft.with_lora(params, a.targets, a.rank, a.alpha, config.seed, a.dropout)


def run(config: Config, directory: Path) -> dict[str, float]:
    schedule = Cosine(config.lr, config.steps, config.warmup_steps, end=0.1 * config.lr)
    base = smollm2_instruct()
    train, held_out, asked = split(config, base.tokenizer)
    print("measuring the base model", flush=True)
    before = sft.once(directory / "before.json", lambda: measure(base, config, held_out))
    said_before = sft.once(
        directory / "answers.json", lambda: sft.answer(base, asked, config.answer_tokens)
    )
    params, rule = adapted(config, base.params)
    fitted = fit(
        next_token(base.model),
        source.supervised_source(train, config.batch_size * config.accumulate, config.seed),
        params,
        AdamW(schedule, weight_decay=0.0),
        Training(
            config.steps,
            config.accumulate,
            log_every=5,
            eval_every=config.eval_every,
            save_every=config.save_every,
            seed=config.seed,
            directory=directory,
        ),
        rule=rule,
        evaluate=lambda params: likelihood(
            dataclasses.replace(base, params=params), config, held_out
        ),
        identity=dataclasses.replace(config, eval_every=None, save_every=1),
    )
    tuned = dataclasses.replace(base, params=fitted.params)
    print("measuring the tuned model", flush=True)
    after = measure(tuned, config, held_out)
    keep(tuned, config, directory, asked, said_before)
    return {f"before/{k}": v for k, v in before.items()} | {
        f"after/{k}": v for k, v in after.items()
    }


def keep(
    tuned: hub.Pretrained, config: Config, directory: Path, asked: list[str], before: list[str]
) -> None:
    """The adapter (or the whole model) and the answers, under the run's directory."""
    if config.adapter is None:
        hub.save(directory / "model", tuned)
    else:
        hub.save_adapter(directory / "adapter", tuned)
    after = sft.answer(tuned, asked, config.answer_tokens)
    rows = zip(asked, before, after, strict=True)
    lines = [json.dumps(dict(zip(("prompt", "before", "after"), row, strict=True))) for row in rows]
    (directory / "samples.jsonl").write_text("\n".join(lines) + "\n")


BASE = Config()
SWEEP = chain([{}], [{"adapter": None, "lr": 2e-5}])
SMOKE = {
    "steps": 2,
    "warmup_steps": 1,
    "length": 128,
    "batch_size": 1,
    "held_out": 4,
    "questions": 2,
    "answers": 1,
    "answer_tokens": 4,
    "eval_every": None,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, smoke=SMOKE)
