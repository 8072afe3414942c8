"""Sources of batches for the training loop: supervised rows, a pretraining stream, mixtures.

A Source's state here is {"step": int32}, and a batch is a function of (data, seed, step): a
resumed run goes on exactly where it stopped, and any batch can be rebuilt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from research.data import packing, shuffle
from research.types import Batch, Source

CHOICE_STREAM = -1  # Philox stream of a mixture's choices; epochs use 0, 1, ...


def normalise(batch: Batch, names: Sequence[str] = ("weights",)) -> Batch:
    """The batch with each of the weight arrays divided by its sum over the whole step.

    The objective then returns weighted sums, and micro-batches and devices only add. Raises
    ValueError when an array sums to 0: its loss would be 0 / 0.
    """
    divided = {}
    for name in names:
        total = np.sum(batch[name], dtype=np.float64)
        if not total > 0:
            raise ValueError(f"batch[{name!r}] sums to {total}: nothing in this step has a loss")
        divided[name] = (batch[name] / total).astype(np.float32)
    return {**batch, **divided}


def stepped(batch_at: Callable[[int], Batch]) -> Source:
    """The Source whose batch is a function of the step alone."""

    def init(rng):
        return {"step": np.zeros((), np.int32)}

    def next(state, params=None, context=None, rng=None, last_metrics=None):
        step = int(state["step"])
        return batch_at(step), {"step": np.asarray(step + 1, np.int32)}

    return Source(init, next)


def supervised_batch(table: packing.Table, batch_size: int, seed: int, step: int) -> Batch:
    """Batch `step` of packed or padded rows: each field [B, T], weights summing to 1."""
    count = len(table["tokens"])
    items = shuffle.batch_items(seed, step, batch_size, count)
    return normalise({name: values[items] for name, values in table.items()})


def supervised_source(table: packing.Table, batch_size: int, seed: int) -> Source:
    """Shuffled batches of the rows of `packing.pack` or `packing.pad`, epoch after epoch."""
    if not len(table["tokens"]):
        raise ValueError("empty data set: the table has no rows")
    return stepped(lambda step: supervised_batch(table, batch_size, seed, step))


def pair_source(table: packing.Table, batch_size: int, seed: int) -> Source:
    """Shuffled batches of the rows of `preferences.pair_rows`, each pair weighing 1 / batch_size. Other
    fields of the table, such as the reference's log-probabilities [P, 2], come along.

    ValueError for a table without rows.
    """
    return _equally_weighed(table, batch_size, seed, "pair")


def answer_source(table: packing.Table, batch_size: int, seed: int) -> Source:
    """The same of the rows of `judged.answer_rows`, whose weights are `answer_weights`.

    ValueError for a batch of 1 too: its reference point would be what one mismatched answer says.
    """
    if batch_size < 2:
        raise ValueError(
            "KTO's reference point is a mean over the answers to other prompts of a batch: "
            f"a batch of {batch_size} has too few, take 2 or more"
        )
    return _equally_weighed(table, batch_size, seed, "answer")


def _equally_weighed(table: packing.Table, batch_size: int, seed: int, unit: str) -> Source:
    count = len(table["tokens"])
    if not count:
        raise ValueError(f"empty data set: the table has no {unit}s")
    weights = np.full(batch_size, 1 / batch_size, np.float32)

    def batch(step: int) -> Batch:
        items = shuffle.batch_items(seed, step, batch_size, count)
        rows = {name: values[items] for name, values in table.items()}
        return rows | {f"{unit}_weights": weights}

    return stepped(batch)


def pretraining_batch(
    stream: np.ndarray,
    length: int,
    batch_size: int,
    seed: int,
    step: int,
    end_id: int | None = None,
) -> Batch:
    """Batch `step` of windows of a token stream: each field [B, T], weights summing to 1."""
    count = packing.windows(len(stream), length)
    items = shuffle.batch_items(seed, step, batch_size, count)
    rows = [packing.stream_row(stream, int(i), length, end_id) for i in items]
    return normalise({name: np.stack([row[name] for row in rows]) for name in rows[0]})


def pretraining_source(
    stream: np.ndarray, length: int, batch_size: int, seed: int, end_id: int | None = None
) -> Source:
    """Shuffled windows of `length` tokens of a stream (an array or a memory map), all epochs.

    With `end_id` documents within a window do not see each other: see `packing.stream_row`.
    """
    if packing.windows(len(stream), length) == 0:
        raise ValueError(f"a stream of {len(stream)} tokens has no window of {length} + 1 tokens")
    return stepped(lambda step: pretraining_batch(stream, length, batch_size, seed, step, end_id))


def choices(weights: Sequence[float], seed: int, first: int, count: int) -> np.ndarray:
    """Which source gives each of the steps first, ..., first + count - 1: [count] int64.

    A function of (seed, step): independent draws with probabilities weights / sum(weights).
    """
    uniform = shuffle.raw(seed, CHOICE_STREAM, count, first) / 2.0**64
    edges = np.cumsum(np.asarray(weights, np.float64) / np.sum(weights))
    return np.searchsorted(edges[:-1], uniform, side="right")


def mixture(sources: Sequence[Source], weights: Sequence[float], seed: int) -> Source:
    """Each step's batch from one of the sources, drawn with probability weights / sum(weights).

    State: {"step", "sources": one state each}; only the chosen source moves on. Raises ValueError
    when the weights are not one a source, negative, or all 0.
    """
    if len(sources) != len(weights) or not len(sources):
        raise ValueError(f"{len(sources)} sources but {len(weights)} weights")
    if min(weights) < 0 or not np.sum(weights) > 0:
        raise ValueError(f"weights must be >= 0 and not all 0, got {list(weights)}")

    def init(rng):
        states = tuple(source.init(rng) for source in sources)
        return {"step": np.zeros((), np.int32), "sources": states}

    def next(state, params=None, context=None, rng=None, last_metrics=None):
        step, states = int(state["step"]), list(state["sources"])
        (chosen,) = choices(weights, seed, step, 1)
        batch, states[chosen] = sources[chosen].next(
            states[chosen], params, context, rng, last_metrics
        )
        return batch, {"step": np.asarray(step + 1, np.int32), "sources": tuple(states)}

    return Source(init, next)
