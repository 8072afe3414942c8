"""Sarcastic headlines told from serious ones by a label word, with an adapted SmolLM2-135M-Instruct.

    loaded = hub.load(smollm2())
    data = sarcasm.read(loaded.tokenizer, train=2000, test=400, length=256)
    found = sarcasm.tune(loaded.model, params, lora.TRAINABLE, data, config, directory)

Chance is about one half. The split is the same whatever the seed of a run. `config` is the
experiment's, with the fields of `Schedule`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from research.data import corpora, packing, shuffle, source, supervised
from research.objectives import next_token, states
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Array, Params
from research.weights import base

SPLIT_SEED = 0
QUESTION = "\nSarcastic? Answer:"
LABELS = (" no", " yes")


class Schedule(Protocol):
    """What a config says of training. A step sees batch_size packed rows."""

    lr: float
    warmup_steps: int
    steps: int
    batch_size: int
    seed: int


class Headlines(NamedTuple):
    """Packed rows to train on and to test on, loss on the label word only; the two label ids."""

    train: packing.Table
    test: packing.Table
    labels: list[int]


def read(tokenizer: Any, train: int, test: int, length: int) -> Headlines:
    """`train` and `test` headlines in rows of `length` tokens."""
    labels = [tokenizer.encode(label) for label in LABELS]
    headlines = corpora.headlines()
    order = shuffle.permutation(SPLIT_SEED, 0, len(headlines))

    def packed(indices: np.ndarray) -> packing.Table:
        examples = []
        for headline in (headlines[i] for i in indices):
            prompt, label = tokenizer.encode(headline.text + QUESTION), labels[headline.sarcastic]
            mask = [0] * len(prompt) + [1] * len(label)
            examples.append(supervised.shift([*prompt, *label], mask))
        return packing.pack(examples, length)

    split = order[:test], order[test : test + train]
    return Headlines(packed(split[1]), packed(split[0]), [label[0] for label in labels])


@partial(jax.jit, static_argnums=0)
def hits(model: Any, params: Params, batch: Any, labels: Array) -> tuple[Array, Array]:
    """Correct answers and answers in a batch: the likelier of the two label words counts."""
    hidden = states(model, params, batch)
    words = base.take(params["embed"]["table"], labels)
    said = labels[jnp.argmax(hidden @ words.T, axis=-1)]
    asked = batch["weights"] != 0
    return (asked & (said == batch["targets"])).sum(), asked.sum()


def accuracy(
    model: Any, params: Params, table: packing.Table, labels: list[int], rows: int
) -> float:
    found = [hits(model, params, b, jnp.array(labels)) for b in packing.batches(table, rows)]
    correct, asked = np.sum(jax.device_get(found), axis=0)
    return float(correct / asked)


def tune(
    model: Any, params: Params, trainable: str, data: Headlines, config: Schedule, directory: Path
) -> dict[str, float]:
    """Trains the leaves that `trainable` matches; accuracy on the test rows, and their count."""
    fitted = fit(
        next_token(model),
        source.supervised_source(data.train, config.batch_size, config.seed),
        params,
        AdamW(Cosine(config.lr, config.steps, config.warmup_steps), weight_decay=0.0),
        Training(config.steps, log_every=10, save_every=40, seed=config.seed, directory=directory),
        rule=((trainable, True), (r".*", False)),
        identity=config,
    )
    trained = sum(leaf.size for leaf in jax.tree.leaves(fitted.state.trainable))
    score = accuracy(model, fitted.params, data.test, data.labels, config.batch_size)
    return {"accuracy": score, "trainable_parameters": trained}
