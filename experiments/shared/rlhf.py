"""The first two steps of RLHF on SmolLM2-135M-Instruct: a policy tuned on chosen answers, reward models; and what
is asked of it.

    base = tuned(steps, rank, layers, directory)          # Pretrained, its LoRA merged
    reward, held_out = judges(recipe, layers)             # of halves of the pairs that share no prompt
    learn, kept = instructions(16)                        # (text, ids) of short instructions
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import reward_training, sft
from experiments.shared.first_layers import smollm2_instruct, smollm2_layers
from experiments.shared.reward_training import Recipe
from research import hub
from research.data import corpora, preferences, shuffle
from research.rewards import Reward
from research.rl.record import Rollout
from research.rl.tasks import Task
from research.rl.text import text_task
from research.tokenize import chat
from research.weights.base import merge

Prompt = tuple[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Of the first step."""

    steps: int
    seed: int
    lr: float = 2e-4
    warmup_steps: int = 2
    batch_size: int = 4


def encode(messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    return chat.encode_chat(smollm2_instruct().tokenizer, messages)


@cache
def halves() -> tuple[list, list]:
    """The pairs, in two parts that share no prompt."""
    rows = [(place, preferences.preference(row, place)) for place, row in corpora.preferences_en()]
    return sft.split(rows, len(rows) // 2, key=lambda row: str(row[1].prompt))


@cache
def short_instructions() -> list[str]:
    """Instructions of Alpaca without input, each once, in a mixed order that is always the same."""
    rows = [row["instruction"] for _, row in corpora.alpaca_en() if not row["input"]]
    short = list(dict.fromkeys(text for text in rows if len(text) < 80))
    return [short[i] for i in shuffle.permutation(0, 0, len(short))]


@cache
def instructions(held_out: int) -> tuple[list[Prompt], list[Prompt]]:
    """(to learn with, held out): short instructions as (text, ids)."""
    tokenizer = smollm2_instruct().tokenizer
    asked = [[{"role": "user", "content": text}] for text in short_instructions()]
    ids = [tokenizer.encode(chat.render(tokenizer, turn, True)) for turn in asked]
    found = list(zip(short_instructions(), ids, strict=True))
    return found[held_out:], found[:held_out]


def tuned(steps: int, rank: int, layers: int | None, directory: Path) -> hub.Pretrained:
    """On both halves' chosen answers."""
    base = smollm2_layers(layers)
    rows = [
        (place, [*pair.prompt, {"role": "assistant", "content": pair.chosen}])
        for place, pair in (*halves()[0], *halves()[1])
    ]
    params, rule = sft.with_lora(base.params, sft.LINEAR, rank, 2.0 * rank, 0)
    table = sft.packed(rows, encode, 256)
    done = sft.tune(base, params, rule, table, Tuning(steps, 0), directory / "sft")
    return dataclasses.replace(done, params=merge(done.params))


@cache
def judges(recipe: Recipe, layers: int) -> tuple[Reward, Reward]:
    """(the reward, the one that is never optimised)."""
    base, cut = smollm2_layers(layers), reward_training.recent(encode, 64)
    made = []
    for seed, half in enumerate(halves()):
        table = reward_training.rows(half, cut, 192)
        params = reward_training.trained(base, table, recipe, seed, None)
        made.append(reward_training.as_reward(base, params, cut, 192))
    return made[0], made[1]


def task(base: hub.Pretrained, prompts: list[Prompt], reward: Reward, tokens: int) -> Task:
    tokenizer, size = base.tokenizer, base.model.config.vocab_size
    return text_task(size, prompts, tokenizer.decode, reward, tokens, tokenizer.stop_ids)


def told(
    base: hub.Pretrained, rollout: Rollout, prompts: list[Prompt]
) -> tuple[list[str], list[str]]:
    """(what was asked, what was answered) in a rollout, as a reward takes them."""
    known, stops = {tuple(ids): text for text, ids in prompts}, base.tokenizer.stop_ids
    asked, answers = [], []
    for i in range(len(rollout.scores)):
        chosen = np.flatnonzero(rollout.mask[i])
        asked.append(known[tuple(rollout.tokens[i, : chosen[0] + 1].tolist())])
        ids = rollout.targets[i, chosen].tolist()
        answers.append(base.tokenizer.decode(ids[:-1] if ids[-1] in stops else ids))
    return asked, answers
