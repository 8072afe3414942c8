"""Drafts for speculative decoding: what may come next, and what it was drawn from.

A draft is a `read` of the prompt, which gives a state, and a `propose`, which from the text so far
gives `count` tokens and the next state. Two exist: a smaller `DraftModel`, and `Lookup`, which has no
parameters: it finds where the last tokens stood before and proposes what came after (Saxena 2023,
"Prompt Lookup Decoding"; a longer match wins over a shorter one, then a later over an earlier one).
Its distribution is one-hot.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from research.decode.filters import Past
from research.decode.generate import prefill
from research.decode.sampling import Filters, filtered
from research.models.attention import Cache, LayerCache
from research.models.decoder import Decoder
from research.types import Array, Params


@struct.dataclass
class Text:
    """One row [S] as far as it goes: padding up to `start`, tokens up to `end`."""

    tokens: Array
    start: Array
    end: Array

    def past(self, ends: Array) -> Past:
        """One row for each of `ends` [R], up to there."""
        R = ends.shape[0]
        rows = jnp.broadcast_to(self.tokens, (R, *self.tokens.shape))
        return Past(rows, jnp.broadcast_to(self.start, R), ends)


@struct.dataclass
class Proposal:
    """tokens [count]; q [count, V], what each was drawn from; valid [count] bool, true then false.

    q is 0 where a proposal is not valid.
    """

    tokens: Array
    q: Array
    valid: Array


@dataclass(frozen=True)
class Lookup:
    """Proposes up to `count` tokens that followed the last `ngram` or fewer before."""

    count: int = 8
    ngram: int = 3

    def __post_init__(self):
        for name in ("count", "ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"lookup: {name} must be at least 1, got {getattr(self, name)}")

    def read(self, params: Params, tokens: Array, segments: Array, slots: int) -> None:
        """Nothing to remember."""

    def propose(
        self,
        params: Params,
        state: None,
        text: Text,
        filters: Filters,
        said: Array,
        vocab_size: int,
        key: Array,
    ) -> tuple[Proposal, None]:
        tokens, found = matched(text, self.ngram, self.count)
        # A learned prompt's ids, V and more, may have stood there, but are never said.
        valid = found & (jnp.cumsum(tokens >= vocab_size) == 0)
        q = jnp.where(valid[:, None], jax.nn.one_hot(tokens, vocab_size), 0)
        return Proposal(tokens, q, valid), None


@dataclass(frozen=True)
class DraftModel:
    """Proposes `count` tokens of a model with the same vocabulary; its parameters come apart."""

    model: Decoder
    count: int = 4

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"draft model: count must be at least 1, got {self.count}")

    def read(self, params: Params, tokens: Array, segments: Array, slots: int) -> Cache:
        return prefill(self.model, params, tokens, segments, slots)[1]

    def propose(
        self,
        params: Params,
        cache: Cache,
        text: Text,
        filters: Filters,
        said: Array,
        vocab_size: int,
        key: Array,
    ) -> tuple[Proposal, Cache]:
        def step(carry, i):
            cache, tokens = carry
            last = lax.dynamic_slice_in_dim(tokens, text.end - 1 + i, 1)
            logits, cache = self.model.apply({"params": params}, last[None], cache=cache)
            past = text.replace(tokens=tokens).past((text.end + i)[None])
            q = distribution(logits[0], filters, past, (said + i)[None])[0]
            token = draw(jax.random.fold_in(key, i), q)
            return (cache, tokens.at[text.end + i].set(token)), (token, q)

        # One more than is proposed, so that the cache holds all proposals, should all be kept.
        begun = rollback(cache, text.end - 1), text.tokens
        (cache, _), (tokens, q) = lax.scan(step, begun, jnp.arange(self.count + 1))
        valid = jnp.ones(self.count, bool)
        return Proposal(tokens[:-1], q[:-1], valid), cache


def matched(text: Text, ngram: int, count: int) -> tuple[Array, Array]:
    """[count] tokens that followed the longest earlier match, and whether there is one.

    Where the match reaches the end, what follows it is taken to repeat.
    """
    slots = jnp.arange(text.tokens.shape[0])
    equal, length = jnp.ones(slots.shape, bool), jnp.zeros(slots.shape, jnp.int32)
    for back in range(ngram):
        # Slot j ends a match of back + 1 tokens when tokens[j - back] is the text's own.
        equal &= jnp.roll(text.tokens, back) == text.tokens[text.end - 1 - back]
        equal &= (slots - back >= text.start) & (slots < text.end - 1)
        length += equal
    best = slots[-1] - jnp.argmax(length[::-1])
    period = text.end - 1 - best
    after = best + 1 + jnp.arange(count) % jnp.maximum(period, 1)
    return text.tokens[after], length[best] > 0


def distribution(logits: Array, filters: Filters, past: Past, said: Array) -> Array:
    """Probabilities [R, V] of the next token; one-hot when greedy."""
    logits = filtered(logits, filters, past, said)
    if filters.temperature is None:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jax.nn.softmax(logits, axis=-1)


def draw(key: Array, weights: Array) -> Array:
    """A token, int32, with probability proportional to its weight [V]."""
    return jax.random.categorical(key, jnp.log(weights)).astype(jnp.int32)


def rollback(cache: Cache, index: Array) -> Cache:
    """The cache as it was when `index` slots were filled; every slot given back held a token.

    ValueError for layers that do not keep every token: what they forgot does not come back.
    """
    kept = jax.tree.leaves(cache.layers, is_leaf=lambda node: isinstance(node, LayerCache))
    if not all(isinstance(layer, LayerCache) for layer in kept):
        raise ValueError(
            "a cache that forgets (StreamingAttention, LinearAttention) cannot go back"
        )
    filled = jnp.arange(cache.segment_ids.shape[1]) < index
    return cache.replace(
        index=index,
        segment_ids=jnp.where(filled, cache.segment_ids, 0),
        lengths=cache.lengths - (cache.index - index),
    )
