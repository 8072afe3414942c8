"""Held-out negative log-likelihood: nats a token, perplexity, bits a byte.

Conventions, which must agree before numbers are compared: natural logarithm; each text stands in
one window of its own; no BOS token unless it is in the ids, so a text's first token is not
predicted; sums over all tokens are divided once, never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.decode.prompts import bucket
from research.losses.lm import token_log_probs
from research.objectives import head_params, next_token, project_with, states
from research.types import Array, Batch, Params


@dataclass(frozen=True)
class Likelihood:
    """Summed −log p in nats over `tokens` predicted tokens, which stand for `bytes` of UTF-8."""

    nll: float
    tokens: int
    bytes: int | None = None

    @property
    def per_token(self) -> float:
        """Nats a token."""
        if not self.tokens:
            raise ValueError("no token was predicted: every weight is 0, or no text has two tokens")
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.per_token)

    @property
    def bits_per_byte(self) -> float:
        """Free of the tokenizer, so that models with different vocabularies can be compared."""
        if not self.bytes:
            raise ValueError("bits per byte need the number of bytes that the tokens stand for")
        return self.nll / (self.bytes * math.log(2))

    def __add__(self, other: Likelihood) -> Likelihood:
        known = self.bytes is not None and other.bytes is not None
        total = self.bytes + other.bytes if known else None
        return Likelihood(self.nll + other.nll, self.tokens + other.tokens, total)


def held_out(
    model: Any, params: Params, batches: Iterable[Batch], byte_count: int | None = None
) -> Likelihood:
    """Over batches as `next_token` takes them, packed or not.

    Counts every position of non-zero weight once, whatever the weight's size. `byte_count` is that
    of the predicted tokens' text.
    """
    nll, tokens = 0.0, 0
    for batch in batches:
        more, counted = jax.device_get(_batch_sums(model, params, batch))
        nll, tokens = nll + float(more), tokens + int(counted)
    return Likelihood(nll, tokens, byte_count)


def of_sequences(
    model: Any,
    params: Params,
    sequences: Sequence[Sequence[int]],
    byte_count: int | None = None,
    batch_size: int = 8,
) -> Likelihood:
    """Over token sequences, each in a window of its own, from its second token on."""
    log_probs = continuation_log_probs(model, params, sequences, [1] * len(sequences), batch_size)
    nll = -math.fsum(float(row.sum(dtype=np.float64)) for row in log_probs)
    return Likelihood(nll, sum(len(row) for row in log_probs), byte_count)


def continuation_log_probs(
    model: Any,
    params: Params,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    batch_size: int = 8,
) -> list[np.ndarray]:
    """log p of tokens starts[i], starts[i]+1, ... of sequence i given all before: one array each.

    A start must be at least 1, as the first token has nothing before it. Sequences of like length
    share a batch, and the head is multiplied only for tokens that are asked for.
    """
    context = model.config.max_length
    for i, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        if len(ids) > context:
            raise ValueError(f"sequence {i} has {len(ids)} tokens; the context is {context}")
        if start < 1:
            raise ValueError(f"sequence {i}: start must be at least 1, got {start}")
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = windows([sequences[i] for i in chosen], [starts[i] for i in chosen], batch_size)
        scores = jax.device_get(_batch_log_probs(model, params, batch))
        for row, i in enumerate(chosen):
            out[i] = scores[row, starts[i] - 1 : max(len(sequences[i]) - 1, 0)]
    return out


def windows(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], rows: int | None = None
) -> Batch:
    """A batch of one sequence a row, weight 1 where the target's index is `start` or later.

    Rows are padded on the right to a size bucket, and their number to `rows`.
    """
    B, T = rows or len(sequences), bucket(max(1, max(map(len, sequences)) - 1))
    batch = {name: np.zeros((B, T), np.int32) for name in ("tokens", "targets", "segment_ids")}
    weights = np.zeros((B, T), np.float32)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        n = max(len(ids) - 1, 0)
        batch["tokens"][row, :n], batch["targets"][row, :n] = ids[:-1], ids[1:]
        batch["segment_ids"][row, :n] = 1
        weights[row, start - 1 : n] = 1
    return batch | {"weights": weights}


@partial(jax.jit, static_argnums=0)
def _batch_sums(model: Any, params: Params, batch: Batch) -> tuple[Array, Array]:
    _, metrics = next_token(model)(params, None, batch, None)
    return metrics["loss"].total, metrics["loss"].count


@partial(jax.jit, static_argnums=0)
def _batch_log_probs(model: Any, params: Params, batch: Batch) -> Array:
    project, head = partial(project_with, model), head_params(params)
    hidden = states(model, params, batch)
    targets, weights = jnp.asarray(batch["targets"]), jnp.asarray(batch["weights"])
    return token_log_probs(project, head, hidden, targets, weights)
