"""Sarcastic headlines told from serious ones by a classification head on a decoder.

    data = read(tokenizer, train=2000, test=400, length=24)
    params = with_head(model, params, seed)
    params, found = tune(model, params, rule, optimizer, data, config, directory)

The test headlines are the last of the mixed order, whatever the seed of a run: no trial of rates or
pooling saw them. Chance is about one half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.shared.lesson import Lesson
from experiments.shared.sarcasm import SPLIT_SEED
from research.data import corpora, labelled, shuffle, source
from research.data.corpora import Headline
from research.data.packing import Table
from research.models import heads
from research.objectives import classify
from research.train.loop import Training, fit
from research.train.optim import Optimizer
from research.train.partition import Rule
from research.types import Array, Params

HEAD = heads.Head(2, heads.masked_mean)


class Classes(NamedTuple):
    """Rows to train on and to test on, one headline each."""

    train: Table
    test: Table


@cache
def _headlines() -> list[Headline]:
    return corpora.headlines()


def split(train: int, test: int) -> tuple[list[Headline], list[Headline]]:
    """The first `train` headlines to learn from, and `test` from the end, the same for the same `test`.

    A headline that is tested on is not learned from, though some stand twice in the data. ValueError
    when there are fewer.
    """
    headlines = _headlines()
    if train + test > len(headlines):
        raise ValueError(f"{train} and {test} headlines were asked for; there are {len(headlines)}")
    order = [headlines[i] for i in shuffle.permutation(SPLIT_SEED, 0, len(headlines))]
    held_out = order[len(order) - test :]
    texts = {headline.text for headline in held_out}
    return [h for h in order if h.text not in texts][:train], held_out


def rows(
    encode: Callable[[str], Sequence[int]], headlines: Sequence[Headline], length: int
) -> Table:
    """Rows for `classify`, label 1 for sarcasm; of a longer headline the first `length` tokens count."""
    sequences = [encode(headline.text)[:length] for headline in headlines]
    return labelled.rows(sequences, [int(headline.sarcastic) for headline in headlines], length)


def read(tokenizer: Any, train: int, test: int, length: int) -> Classes:
    """`train` and `test` headlines as rows of `length` tokens."""
    return Classes(*(rows(tokenizer.encode, each, length) for each in split(train, test)))


def with_head(model: Any, params: Params, seed: int) -> Params:
    """`params` with a fresh head for two classes."""
    rng = jax.random.fold_in(jax.random.key(seed), 2)
    return heads.add(params, HEAD, model.config.width, rng)


@partial(jax.jit, static_argnums=0)
def _hits(model: Any, params: Params, batch: Table) -> tuple[Array, Array]:
    _, metrics = classify(model, HEAD)(params, None, batch, None)
    return metrics["accuracy"].total, metrics["accuracy"].count


def accuracy(model: Any, params: Params, table: Table, rows: int = 50) -> float:
    """The part of the table's headlines that the head says right, `rows` of them at a time."""
    firsts = range(0, len(table["labels"]), rows)
    batches = [{name: each[n : n + rows] for name, each in table.items()} for n in firsts]
    correct, asked = np.sum(jax.device_get([_hits(model, params, b) for b in batches]), axis=0)
    return float(correct / asked)


def tune(
    model: Any,
    params: Params,
    rule: Rule,
    optimizer: Optimizer,
    data: Classes,
    config: Lesson,
    directory: Path,
) -> tuple[Params, dict[str, float]]:
    """Trains the leaves that `rule` selects: all parameters, and accuracy with what was trained.

    A run is too short to be saved on its way.
    """
    fitted = fit(
        classify(model, HEAD),
        source.supervised_source(data.train, config.batch_size, config.seed),
        params,
        optimizer,
        Training(config.steps, log_every=5, keep=1, seed=config.seed, directory=directory),
        rule=rule,
        identity=config,
    )
    trained = sum(leaf.size for leaf in jax.tree.leaves(fitted.state.trainable))
    score = accuracy(model, fitted.params, data.test)
    return fitted.params, {"accuracy": score, "trainable_parameters": trained}
