"""Short real pairs of answers, a model that learns from them, and how far its answers moved.

SmolLM2-135M-Instruct with LoRA on every matrix of a block; the reference is the model before training,
whose log-probabilities are taken once a process. `Setting` is what an experiment's config has in common.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np

from experiments.shared import sft
from experiments.shared.first_layers import smollm2_instruct, smollm2_layers
from research.data import corpora, preferences
from research.data.packing import Table
from research.data.preferences import Preference
from research.evaluate.preferences import Answered, answered, margins
from research.tokenize import chat
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Objective, Params, Source

Pair = tuple[str, Preference]
SEEN = 20  # how many of the pairs that were trained on are measured again
MEASURES = {
    "right sign": "accuracy",
    "margin": "margin",
    "chosen": "chosen",
    "rejected": "rejected",
}
# Of a table: what `moved` gives.
COLUMNS = {
    f"{part}: {name}": f"{part.replace(' ', '_')}/{key}"
    for part in ("seen", "held out")
    for name, key in MEASURES.items()
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """`length`: tokens of an answer with its prompt; `longest_prompt`: tokens, longer ones are left out."""

    lr: float = 5e-4
    warmup_steps: int = 2
    steps: int = 10
    batch_size: int = 4
    rank: int = 16
    length: int = 96
    longest_prompt: int = 72
    held_out: int = 30
    layers: int | None = None
    seed: int = 0


def encode(messages: list) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) of a conversation in the model's own template."""
    return chat.encode_chat(smollm2_instruct().tokenizer, messages)


@cache
def split(longest_prompt: int, held_out: int) -> tuple[list[Pair], list[Pair]]:
    """English pairs whose prompt is short, to train on and held out."""
    rows = [(place, preferences.preference(row, place)) for place, row in corpora.preferences_en()]
    short = [row for row in rows if _prompt_tokens(row[1]) <= longest_prompt]
    return sft.split(short, held_out)


def _prompt_tokens(row: Preference) -> int:
    _, mask = encode([*row.prompt, {"role": "assistant", "content": row.chosen}])
    return int(np.flatnonzero(mask)[-1] + 1 - np.count_nonzero(mask))


@cache
def tables(longest_prompt: int, held_out: int, length: int) -> tuple[Table, Table]:
    """Rows of those pairs."""
    found = []
    for part in split(longest_prompt, held_out):
        examples, counts = preferences.pairs(part, encode, length)
        print(f"  {counts}", flush=True)
        found.append(preferences.pair_rows(examples, 2 * length))
    return found[0], found[1]


@cache
def references(
    longest_prompt: int, held_out: int, length: int, layers: int | None
) -> tuple[Answered, Answered]:
    """What the model gives both tables before training."""
    base, both = smollm2_layers(layers), tables(longest_prompt, held_out, length)
    return tuple(answered(base.model, base.params, table) for table in both)


def of_setting(config: Setting) -> tuple[tuple[Table, Table], tuple[Answered, Answered]]:
    """Both tables and what the reference gives them; the same objects for every run."""
    sizes = config.longest_prompt, config.held_out, config.length
    return tables(*sizes), references(*sizes, config.layers)


def tuned(config: Setting, objective: Objective, source: Source, directory: Path) -> Params:
    """The parameters after `config.steps`; cosine from `lr` to a tenth of it."""
    base = smollm2_layers(config.layers)
    params, rule = sft.with_lora(
        base.params, sft.LINEAR, config.rank, 2.0 * config.rank, config.seed
    )
    schedule = Cosine(config.lr, config.steps, config.warmup_steps, end=0.1 * config.lr)
    training = Training(config.steps, log_every=2, seed=config.seed, directory=directory)
    optimizer = AdamW(schedule, weight_decay=0.0)
    return fit(objective, source, params, optimizer, training, rule=rule, identity=config).params


def moved(config: Setting, params: Params) -> dict[str, float]:
    """{part/name: value} of the first `SEEN` pairs of the training part and of all `held_out`: share with
    a margin above 0, mean margin, how far each answer moved (nats), share whose chosen answer is likelier."""
    base, found = smollm2_layers(config.layers), {}
    (train, kept), (of_train, of_kept) = of_setting(config)
    seen = {name: rows[:SEEN] for name, rows in train.items()}
    of_seen = Answered(of_train.log_probs[:SEEN], of_train.tokens[:SEEN])
    for part, rows, before in (("seen", seen, of_seen), ("held_out", kept, of_kept)):
        after = answered(base.model, params, rows)
        margin, ratios = margins(after, before), after.log_probs - before.log_probs
        found |= {
            f"{part}/accuracy": float((margin > 0).mean()),
            f"{part}/margin": float(margin.mean()),
            f"{part}/chosen": float(ratios[:, 0].mean()),
            f"{part}/rejected": float(ratios[:, 1].mean()),
            f"{part}/likelier": after.accuracy,
            f"{part}/likelier_before": before.accuracy,
        }
    return found
