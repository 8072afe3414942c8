"""A reward model on the first layers of SmolLM2-135M-Instruct: what experiments with one have in common.

    encode = recent(partial(chat.encode_chat, tokenizer), 64)
    table = rows(pairs, encode, length=192)
    params = trained(base, table, recipe, seed, directory)
    reward = as_reward(base, params, encode, length=192)        # research.rewards.Reward

LoRA on every matrix and a head of one output. It reads the mean over the tokens of an answer and its prompt:
after a part of the layers the last token has not gathered much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments.shared import sft
from research import hub, rewards
from research.data import preferences, source
from research.data.formats import Message
from research.data.packing import Table
from research.data.preferences import Preference
from research.data.supervised import Encode
from research.losses.reward import pairwise
from research.models import heads
from research.models.heads import Head, masked_mean
from research.objectives import reward
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Params

HEAD = Head(1, masked_mean, init_std=0.002)  # scores begin near 0, the loss near ln 2
Loss = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The head learns `head_rate` times as fast as the LoRA, for it begins with nothing. `centre` keeps
    scores about 0: see `losses.reward.pairwise`."""

    lr: float = 2e-4
    head_rate: float = 20.0
    warmup_steps: int = 3
    steps: int = 40
    batch_size: int = 4
    rank: int = 8
    centre: float = 0.01


def recent(encode: Encode, prompt: int) -> Encode:
    """What `encode` gives, less all but the last `prompt` tokens before the first learned one, so that a
    long prompt leaves room for its answer."""

    def cut(messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = encode(messages)
        learned = np.flatnonzero(mask)
        first = max(int(learned[0]) - prompt, 0) if len(learned) else 0
        return ids[first:], mask[first:]

    return cut


def rows(pairs: Sequence[tuple[str, Preference]], encode: Encode, length: int) -> Table:
    """Rows of two answers of at most `length` tokens each, with what is left of the prompt."""
    examples, counts = preferences.pairs(pairs, encode, length)
    print(f"  {counts}", flush=True)
    return preferences.pair_rows(examples, 2 * length)


def trained(
    base: hub.Pretrained,
    table: Table,
    recipe: Recipe,
    seed: int,
    directory: Path | None,
    head: Head = HEAD,
) -> Params:
    """The parameters of the reward model after `recipe.steps`; the head begins small and random."""
    rng = jax.random.fold_in(jax.random.key(seed), 2)
    params, rule = sft.with_lora(base.params, sft.LINEAR, recipe.rank, 2.0 * recipe.rank, seed)
    params = heads.add(params, head, base.model.config.width, rng)
    schedule = Cosine(recipe.lr, recipe.steps, recipe.warmup_steps, end=0.1 * recipe.lr)
    rates = ((heads.TRAINABLE, recipe.head_rate), (r".*", 1.0))
    return fit(
        reward(base.model, head, partial(pairwise, centre=recipe.centre)),
        source.pair_source(table, recipe.batch_size, seed),
        params,
        AdamW(schedule, rates=rates, weight_decay=0.0),
        Training(recipe.steps, log_every=4, seed=seed, directory=directory),
        rule=((heads.TRAINABLE, True), *rule),
        identity=recipe,
    ).params


def as_reward(base: hub.Pretrained, params: Params, encode: Encode, length: int) -> rewards.Reward:
    """The reward model as a function of prompts, each one message of a user, and answers."""

    def ids(prompt: str, answer: str) -> np.ndarray:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return encode(turns)[0]

    return rewards.checked(
        rewards.learned(base.model, params, ids, HEAD, max_length=length, rows=16)
    )
