"""Sarcastic headlines told from serious ones by a label word, with an adapted SmolLM2-135M-Instruct.

    loaded = smollm2_instruct()
    data = sarcasm.read(loaded.tokenizer, train=2000, test=400, length=256)
    found = sarcasm.tune(loaded.model, params, lora.TRAINABLE, data, config, directory)

or, with any method of `methods` and one headline a row,

    adapted, data = sarcasm.prepare(config)
    params, found = sarcasm.adapt(adapted, data, config, directory)

Chance is about one half. The split is the same whatever the seed of a run. `config` is the
experiment's, with the fields of `lesson.Schedule` or of `Task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.first_layers import smollm2_instruct
from experiments.shared.lesson import Lesson, Schedule
from experiments.shared.methods import Adapted, Method
from research.data import corpora, packing, shuffle, source, supervised
from research.objectives import next_token, states
from research.train import metrics
from research.train.loop import Training, fit
from research.train.optim import AdamW, Finished, Optimizer
from research.train.schedules import Cosine
from research.types import Array, Objective, Params
from research.weights import base

SPLIT_SEED = 0
QUESTION = "\nSarcastic? Answer:"
LABELS = (" no", " yes")


class Headlines(NamedTuple):
    """Packed rows to train on and to test on, loss on the label word only; the two label ids."""

    train: packing.Table
    test: packing.Table
    labels: list[int]


def read(tokenizer: Any, train: int, test: int, length: int) -> Headlines:
    """`train` and `test` headlines in rows of `length` tokens."""
    labels = label_tokens(tokenizer)
    headlines = corpora.headlines()
    order = shuffle.permutation(SPLIT_SEED, 0, len(headlines))

    def packed(indices: np.ndarray) -> packing.Table:
        chosen = (headlines[i] for i in indices)
        return packing.pack([example(tokenizer, each, labels) for each in chosen], length)

    split = order[:test], order[test : test + train]
    return Headlines(packed(split[1]), packed(split[0]), [label[0] for label in labels])


def read_rows(
    tokenizer: Any, train: int, test: int, length: int, before: Sequence[int] = ()
) -> Headlines:
    """One headline a row, for methods that cannot tell packed ones apart.

    Only headlines that fit in `length` tokens with the question are taken (a row does not read the
    label): the first `test` of them, and the next `train`. Tokens `before` (those of a soft prompt) are put in front of
    each; a row has `length` more than them. ValueError when there are too few.
    """
    labels, found = label_tokens(tokenizer), []
    headlines = corpora.headlines()
    for index in shuffle.permutation(SPLIT_SEED, 0, len(headlines)):
        made = example(tokenizer, headlines[index], labels, before)
        if len(made.tokens) <= len(before) + length:
            found.append(made)
        if len(found) == test + train:
            break
    else:
        raise ValueError(f"{len(found)} headlines have at most {length} tokens, not {test + train}")
    width = len(before) + length
    tables = packing.pad(found[test:], width), packing.pad(found[:test], width)
    return Headlines(*tables, [label[0] for label in labels])


def label_tokens(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(label) for label in LABELS]


def example(
    tokenizer: Any,
    headline: corpora.Headline,
    labels: list[list[int]],
    before: Sequence[int] = (),
) -> supervised.Example:
    """The headline and the question, then the label, which alone has a loss."""
    prompt = tokenizer.encode(headline.text + QUESTION)
    label = labels[headline.sarcastic]
    made = supervised.shift([*prompt, *label], [0] * len(prompt) + [1] * len(label))
    return supervised.prepend(made, before)


@partial(jax.jit, static_argnums=0)
def hits(model: Any, params: Params, batch: Any, labels: Array) -> tuple[Array, Array, Array]:
    """Correct answers, nats of the right one, and answers, in a batch.

    Between the two label words: the likelier one counts, and their probabilities sum to 1; another
    target has infinite nats.
    """
    hidden = states(model, params, batch)
    words = base.take(params["embed"]["table"], labels)
    scores = hidden @ words.T
    said = labels[jnp.argmax(scores, axis=-1)]
    asked, own = batch["weights"] != 0, batch["targets"][..., None] == labels
    log_probs = jnp.where(own, jax.nn.log_softmax(scores, axis=-1), -jnp.inf).max(-1)
    nats = jnp.where(asked, -log_probs, 0).sum()
    return (asked & (said == batch["targets"])).sum(), nats, asked.sum()


def scores(
    model: Any, params: Params, table: packing.Table, labels: list[int], rows: int
) -> dict[str, float]:
    """`accuracy`, and `nll`, the nats of the right label word when it is one of the two."""
    found = [hits(model, params, b, jnp.array(labels)) for b in packing.batches(table, rows)]
    correct, nats, asked = np.sum(jax.device_get(found), axis=0)
    return {"accuracy": float(correct / asked), "nll": float(nats / asked)}


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
    found = scores(model, fitted.params, data.test, data.labels, config.batch_size)
    return {"accuracy": found["accuracy"], "trainable_parameters": trained}


def objective_of(adapted: Adapted) -> Objective:
    """What a method trains: a row has one label, so the head runs at one position of each."""
    return adapted.penalised(next_token(adapted.model, chunk=1))


def optimizer_of(adapted: Adapted, config: Lesson) -> Optimizer | Finished:
    lr = Cosine(adapted.lr, config.steps, config.warmup_steps)
    return adapted.finished(AdamW(lr, weight_decay=0.0))


def adapt(
    adapted: Adapted, data: Headlines, config: Lesson, directory: Path
) -> tuple[Params, dict[str, float]]:
    """An adapted model trained on `read_rows`: its parameters, and what it scores on the test rows.

    `s_per_step` is the median of the steps after the first, which compiles. A method that trains
    nothing is scored as it is.
    """
    params, found = adapted.params, {"trainable_parameters": 0}
    if adapted.rule is not None:
        fitted = fit(
            objective_of(adapted),
            source.supervised_source(data.train, config.batch_size, config.seed),
            params,
            optimizer_of(adapted, config),
            Training(config.steps, log_every=1, keep=1, seed=config.seed, directory=directory),
            rule=adapted.rule,
            identity=config,
        )
        params = fitted.params
        steps = [
            row for row in metrics.read(directory / "metrics.jsonl") if row["split"] == "train"
        ]
        found = {
            "trainable_parameters": sum(x.size for x in jax.tree.leaves(fitted.state.trainable)),
            "s_per_step": median(row["s_per_step"] for row in steps[1:] or steps),
        }
    rows = config.batch_size
    return params, found | scores(adapted.model, params, data.test, data.labels, rows)


class Task(Lesson, Protocol):
    """What is learned besides, and by which method."""

    method: Method
    length: int
    train: int
    test: int


def ready(config: Task, model: Any, params: Params) -> Adapted:
    """A model ready to be trained by config.method for config.steps."""
    rng = jax.random.fold_in(jax.random.key(config.seed), 1)
    return config.method.apply(model, params, rng, config.steps)


def prepare(config: Task) -> tuple[Adapted, Headlines]:
    """SmolLM2 ready to be trained, and the rows that it sees."""
    loaded = smollm2_instruct()
    adapted = ready(config, loaded.model, loaded.params)
    data = read_rows(loaded.tokenizer, config.train, config.test, config.length, adapted.before)
    return adapted, data
