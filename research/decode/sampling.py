"""How the next token is chosen from logits [B, V]: pure filters, and a choice.

The order is that of Hugging Face's processors: repetition penalty, temperature, top-k, top-p,
min-p. A filter sets the logits of what it removes to -inf; each keeps at least one token.

References: top-k, Fan et al. 2018 (arXiv:1805.04833); top-p, Holtzman et al. 2019
(arXiv:1904.09751); min-p, Nguyen et al. 2024 (arXiv:2407.01082); repetition penalty, Keskar et
al. 2019 (arXiv:1909.05858), with negative logits multiplied, so that they too become less likely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from research.types import Array


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; None switches a filter off.

    max_tokens counts new tokens. Generation of a row ends with the first of `stop_ids`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int = 128
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, holds, wanted in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            (
                "repetition_penalty",
                self.repetition_penalty is None or self.repetition_penalty > 0,
                "more than 0",
            ),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ):
            if not holds:
                raise ValueError(f"sampling: {name} must be {wanted}, got {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters(self) -> Filters:
        """The part that acts on logits; the most likely token needs no other filter if greedy."""
        if self.greedy:
            return Filters(repetition_penalty=self.repetition_penalty)
        return Filters(
            self.temperature, self.top_p, self.min_p, self.repetition_penalty, self.top_k
        )


@struct.dataclass
class Filters:
    """The numbers of a Sampling as a pytree: changing one of them compiles nothing anew.

    temperature None is greedy.
    """

    temperature: float | Array | None = None
    top_p: float | Array | None = None
    min_p: float | Array | None = None
    repetition_penalty: float | Array | None = None
    top_k: int | None = struct.field(pytree_node=False, default=None)


def choose(logits: Array, filters: Filters, keys: Array, seen: Array | None = None) -> Array:
    """One token a row, [B] int32, from logits [B, V] and one key a row.

    `seen` [B, V] marks the tokens of prompt and answer so far, for the repetition penalty. A row's
    choice depends on its own logits and key alone.
    """
    logits = filtered(logits, filters, seen)
    if filters.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filtered(logits: Array, filters: Filters, seen: Array | None = None) -> Array:
    """Logits [B, V] after all filters, float32."""
    logits = logits.astype(jnp.float32)
    if filters.repetition_penalty is not None:
        if seen is None:
            raise ValueError("the repetition penalty needs `seen` [B, V]")
        logits = penalise_repetition(logits, seen, filters.repetition_penalty)
    if filters.temperature is not None:
        logits = logits / filters.temperature
    if filters.top_k is not None:
        logits = keep_top_k(logits, filters.top_k)
    if filters.top_p is not None:
        logits = keep_top_p(logits, filters.top_p)
    if filters.min_p is not None:
        logits = keep_min_p(logits, filters.min_p)
    return logits


def penalise_repetition(logits: Array, seen: Array, penalty: float | Array) -> Array:
    """Where `seen` [B, V]: positive logits divided by `penalty`, negative ones multiplied."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Array, k: int) -> Array:
    """The k largest of each row, and what ties with the k-th."""
    if k >= logits.shape[-1]:
        return logits
    order = ordered_bits(logits)
    smallest = largest(order, lambda least: (order >= least).sum(-1, keepdims=True) >= k)
    return jnp.where(order < smallest, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float | Array) -> Array:
    """The fewest most likely tokens whose probabilities add up to at least p.

    Of equals at the boundary those of the smallest ids are kept.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    order = ordered_bits(probabilities)

    def mass(keep: Array) -> Array:
        return jnp.where(keep, probabilities, 0).sum(-1, keepdims=True)

    least = largest(order, lambda least: mass(order >= least) >= p)
    above, equal = order > least, order == least
    each = jnp.max(probabilities, axis=-1, keepdims=True, where=equal, initial=1e-38)
    wanted = jnp.maximum(jnp.ceil((p - mass(above)) / each), 1)
    keep = above | (equal & (jnp.cumsum(equal, axis=-1) <= wanted))
    keep |= jnp.asarray(p) >= 1  # the sum of all may round to a little more or less than 1
    return jnp.where(keep, logits, -jnp.inf)


def keep_min_p(logits: Array, p: float | Array) -> Array:
    """The tokens at least p times as likely as the most likely one."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    least = p * probabilities.max(-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)


def ordered_bits(x: Array) -> Array:
    """uint32 that sort as the float32 x do (0.0 and -0.0 as one)."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def largest(order: Array, holds: Callable[[Array], Array]) -> Array:
    """The largest number [..., 1] of 32 bits for which the monotone `holds` holds.

    Bisection, bit by bit: a few dozen sums over V, where a sort (and lax.top_k, which sorts) takes
    ten times as long on a CPU.
    """

    def bit(i: int, least: Array) -> Array:
        candidate = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, least)

    return lax.fori_loop(0, 32, bit, jnp.zeros((*order.shape[:-1], 1), jnp.uint32))


def log_prob(logits: Array, tokens: Array) -> Array:
    """log p of `tokens` [B] under the unmodified logits [B, V]: no temperature, no filter."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
