"""Supervised fine-tuning of a pretrained chat model: what experiments of it have in common.

    train, held_out = sft.split(list(formats.conversations(corpora.alpaca_en())), 40)
    table = sft.packed(train, partial(chat.encode_chat, tokenizer), length=512)
    params, rule = sft.with_lora(pretrained.params, sft.LINEAR, rank=16, alpha=32.0, seed=0)
    tuned = sft.tune(pretrained, params, rule, table, config, directory)
    sft.likelihood(tuned, sft.packed(held_out, ...), rows=2).per_token

The held-out rows are the same ones whatever a run's seed. `config` is the experiment's, with the
fields of `lesson.Schedule`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from experiments.shared.lesson import Schedule
from research import hub
from research.data import corpora, packing, shuffle, source, supervised
from research.decode.generate import generate
from research.decode.sampling import Sampling
from research.evaluate import choice, nll
from research.evaluate.nll import Likelihood
from research.evaluate.prompting import Template
from research.objectives import next_token
from research.tokenize import chat
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.partition import Rule
from research.train.schedules import Cosine
from research.types import Params
from research.weights import lora

SPLIT_SEED = 0
LINEAR = r"stack_0/.*/kernel"  # every matrix of a block
Conversation = tuple[str, list[dict[str, Any]]]
Item = TypeVar("Item")


def split(
    items: Sequence[Item], held_out: int, key: Callable[[Item], Any] | None = None
) -> tuple[list[Item], list[Item]]:
    """(to train on, held out) in a mixed order that is always the same.

    With a `key` nothing is trained on whose key is that of something held out: data repeat themselves.
    """
    order = shuffle.permutation(SPLIT_SEED, 0, len(items))
    train, held = [items[i] for i in order[held_out:]], [items[i] for i in order[:held_out]]
    seen = set() if key is None else {key(item) for item in held}
    return [item for item in train if key is None or key(item) not in seen], held


def packed(
    conversations: Sequence[Conversation], encode: supervised.Encode, length: int
) -> packing.Table:
    """Rows of `length` tokens; what a conversation has beyond that is cut off."""
    kept, counts = supervised.examples(conversations, encode, length, truncate="right")
    print(f"  {counts}", flush=True)
    return packing.pack(kept, length)


def with_lora(
    params: Params, targets: str, rank: int, alpha: float, seed: int, dropout: float = 0.0
) -> tuple[Params, Rule]:
    """Parameters with LoRA on the matrices that `targets` matches, and the rule that trains it."""
    rng = jax.random.fold_in(jax.random.key(seed), 1)
    params = lora.add(params, targets, rng, rank, alpha, dropout)
    return params, ((lora.TRAINABLE, True), (r".*", False))


def tune(
    pretrained: hub.Pretrained,
    params: Params,
    rule: Rule,
    table: packing.Table,
    config: Schedule,
    directory: Path,
    *,
    eval_every: int | None = None,
    evaluate: Callable[[hub.Pretrained], Mapping[str, float]] | None = None,
) -> hub.Pretrained:
    """The model after `config.steps` on the leaves of `params` that `rule` selects.

    Cosine from `lr` to a tenth of it. `evaluate` is called every `eval_every` steps and at the end.
    """
    schedule = Cosine(config.lr, config.steps, config.warmup_steps, end=0.1 * config.lr)

    def measured(params: Params) -> Mapping[str, float]:
        return evaluate(dataclasses.replace(pretrained, params=params))

    fitted = fit(
        next_token(pretrained.model),
        source.supervised_source(table, config.batch_size, config.seed),
        params,
        AdamW(schedule, weight_decay=0.0),
        Training(
            config.steps,
            log_every=4,
            eval_every=eval_every,
            save_every=20,
            seed=config.seed,
            directory=directory,
        ),
        rule=rule,
        evaluate=None if evaluate is None else measured,
        identity=config,
    )
    return dataclasses.replace(pretrained, params=fitted.params)


def likelihood(pretrained: hub.Pretrained, table: packing.Table, rows: int) -> Likelihood:
    """Of the supervised tokens of a packed table, `rows` of it at a time, and of their bytes.

    A token that ends an answer is predicted too and has no bytes.
    """
    texts = [
        pretrained.tokenizer.decode(example.targets[example.weights != 0].tolist())
        for example in packing.unpack(table)
    ]
    size = sum(len(text.encode()) for text in texts)
    batches = packing.batches(table, rows)
    return nll.held_out(pretrained.model, pretrained.params, batches, byte_count=size)


def exam(pretrained: hub.Pretrained, name: str, questions: int) -> choice.Proportion:
    """Multiple choice by log p a byte, over the first questions of an exam of `corpora.EXAMS`."""
    encode, template = pretrained.tokenizer.encode, Template()
    asked = [
        choice.question(encode, template.prompt(q.question), template.options(q), q.answer)
        for q in corpora.multiple_choice(name)[:questions]
    ]
    return choice.multiple_choice(pretrained.model, pretrained.params, asked).per_byte


def answer(pretrained: hub.Pretrained, questions: Sequence[str], limit: int) -> list[str]:
    """Greedy answers to single questions in the model's own chat template."""
    tokenizer = pretrained.tokenizer
    prompts = [
        tokenizer.encode(chat.render(tokenizer, [{"role": "user", "content": q}], True))
        for q in questions
    ]
    return greedy(pretrained, prompts, limit)


def greedy(pretrained: hub.Pretrained, prompts: Sequence[Sequence[int]], limit: int) -> list[str]:
    """What the model says after each of some prompts of token ids, up to `limit` tokens."""
    tokenizer = pretrained.tokenizer
    sampling = Sampling(temperature=0.0, max_tokens=limit, stop_ids=tokenizer.stop_ids)
    rng = jax.random.key(0)
    said = generate(pretrained.model, pretrained.params, prompts, rng, sampling)
    return [tokenizer.decode(row) for row in said.rows()]


def once(path: Path, make: Callable[[], Any]) -> Any:
    """`make()`, remembered in a JSON file, so that a resumed run does not measure again."""
    if not path.exists():
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(json.dumps(make(), ensure_ascii=False))
        partial_path.rename(path)
    return json.loads(path.read_text())
