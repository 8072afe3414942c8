"""Filters of logits [B, V]: each sets what it removes to -inf and keeps at least one token.

References: top-k, Fan et al. 2018 (arXiv:1805.04833); top-p, Holtzman et al. 2019
(arXiv:1904.09751); min-p, Nguyen et al. 2024 (arXiv:2407.01082); typical, Meister et al. 2022
(arXiv:2202.00666); epsilon and eta, Hewitt et al. 2022 (arXiv:2210.15191); repetition penalty,
Keskar et al. 2019 (arXiv:1909.05858), with negative logits multiplied, so that they too become
less likely; no repeated n-grams, Paulus et al. 2017 (arXiv:1705.04304).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from research.types import Array


@struct.dataclass
class Past:
    """What each row has said so far, its prompt included, for the filters that look back.

    Row b's tokens are tokens[b, start[b]:end[b]]; what stands outside counts for nothing.
    """

    tokens: Array  # [B, S]
    start: Array  # [B]
    end: Array  # [B]

    @property
    def real(self) -> Array:
        """[B, S] bool."""
        slots = jnp.arange(self.tokens.shape[1])
        return (slots >= self.start[:, None]) & (slots < self.end[:, None])


def mark(tokens: Array, chosen: Array, vocab_size: int) -> Array:
    """[B, V] bool: which ids are among the `chosen` [B, S] of `tokens` [B, S].

    Ids of no logit, V and more, are those of a learned prompt and count for nothing.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    seen = jnp.zeros((tokens.shape[0], vocab_size), bool)
    return seen.at[rows, tokens].max(chosen, mode="drop")


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


def keep_typical(logits: Array, mass: float | Array) -> Array:
    """The tokens whose surprise is nearest to the expected one, |−log p − H|, the fewest whose
    probabilities add up to at least `mass`; all of equals at the boundary."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.where(p > 0, p * log_p, 0).sum(-1, keepdims=True)
    order = ordered_bits(-jnp.abs(log_p + entropy))

    def enough(least: Array) -> Array:
        return jnp.where(order >= least, p, 0).sum(-1, keepdims=True) >= mass

    keep = (order >= largest(order, enough)) | (jnp.asarray(mass) >= 1)
    return jnp.where(keep, logits, -jnp.inf)


def keep_epsilon(logits: Array, epsilon: float | Array) -> Array:
    """The tokens of probability `epsilon` or more, and the most likely one."""
    return keep_likely(logits, jax.nn.softmax(logits, axis=-1), jnp.asarray(epsilon))


def keep_eta(logits: Array, epsilon: float | Array) -> Array:
    """Those of probability η = min(ε, √ε exp(−H)) or more, and the most likely one."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.where(p > 0, p * log_p, 0).sum(-1, keepdims=True)
    return keep_likely(logits, p, jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy)))


def keep_likely(logits: Array, probabilities: Array, least: Array) -> Array:
    keep = (probabilities >= least) | (logits >= logits.max(-1, keepdims=True))
    return jnp.where(keep, logits, -jnp.inf)


def ban(logits: Array, ids: Array) -> Array:
    """Without the tokens `ids` [n]."""
    return logits.at[:, ids].set(-jnp.inf)


def force(logits: Array, ids: Array, said: Array) -> Array:
    """Nothing but ids[said[b]] where row b has said fewer than all of `ids` [n]; said [B]."""
    wanted = ids[jnp.minimum(said, ids.shape[0] - 1)]
    only = jnp.where(jnp.arange(logits.shape[-1]) == wanted[:, None], 0, -jnp.inf)
    return jnp.where((said < ids.shape[0])[:, None], only, logits)


def ban_repeated(logits: Array, past: Past, n: int) -> Array:
    """Without the tokens that would complete an n-gram which the row has said before.

    Where that leaves nothing to say, a row may repeat itself.
    """
    banned = jax.vmap(lambda *row: repeated(*row, n, logits.shape[-1]))(
        past.tokens, past.real, past.end
    )
    stuck = jnp.isneginf(jnp.where(banned, -jnp.inf, logits)).all(-1, keepdims=True)
    return jnp.where(banned & ~stuck, -jnp.inf, logits)


def repeated(tokens: Array, real: Array, end: Array, n: int, vocab_size: int) -> Array:
    """[V] bool of one row [S]: what has followed its last n - 1 tokens before."""
    S = tokens.shape[0]
    if n > S:
        return jnp.zeros(vocab_size, bool)
    ending = lax.dynamic_slice_in_dim(tokens, end - (n - 1), n - 1)
    ending = jnp.where(ending < vocab_size, ending, -1)  # a learned prompt's ids repeat nothing
    # Window j is tokens[j : j + n]. Where one is real, so are the row's last n - 1 tokens.
    match = real[: S - n + 1] & real[n - 1 :]
    for i in range(n - 1):
        match &= tokens[i : S - n + 1 + i] == ending[i]
    return mark(tokens[None, n - 1 :], match[None], vocab_size)[0]
