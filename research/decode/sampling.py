"""How the next token is chosen from logits [B, V]: which filters, and a choice.

The order is that of Hugging Face's processors: repetition penalty, banned tokens,
repeated n-grams, forced tokens, temperature, top-k, top-p, min-p, typical, epsilon, eta.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.decode.filters import (
    Past,
    ban,
    ban_repeated,
    force,
    keep_epsilon,
    keep_eta,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    mark,
    penalise_repetition,
)
from research.types import Array

IDS = ("banned_ids", "forced_ids")


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; None or () switches a filter off.

    max_tokens counts new tokens. Generation of a row ends with the first of `stop_ids`. An answer
    begins with `forced_ids` and holds none of `banned_ids`. no_repeat_ngram n: no n tokens stand
    in this order twice in prompt and answer together.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    typical_p: float | None = None
    epsilon: float | None = None
    eta: float | None = None
    no_repeat_ngram: int | None = None
    banned_ids: tuple[int, ...] = ()
    forced_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, holds, wanted in (
            ("temperature", lambda x: x >= 0, "at least 0"),
            ("top_k", lambda x: x >= 1, "at least 1"),
            ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("min_p", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("repetition_penalty", lambda x: x > 0, "more than 0"),
            ("max_tokens", lambda x: x >= 1, "at least 1"),
            ("typical_p", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("epsilon", lambda x: 0 < x < 1, "in (0, 1)"),
            ("eta", lambda x: 0 < x < 1, "in (0, 1)"),
            ("no_repeat_ngram", lambda x: x >= 1, "at least 1"),
        ):
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"sampling: {name} must be {wanted}, got {value}")
        both = sorted(set(self.banned_ids) & set(self.forced_ids))
        if both:
            raise ValueError(f"sampling: forced_ids and banned_ids both hold {both}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters(self) -> Filters:
        """The part that acts on logits. Greedy, the filters that always keep the most likely
        token are left out."""
        names = [field.name for field in fields(Filters)]
        if self.greedy:
            names = ["repetition_penalty", "no_repeat_ngram", *IDS]
        chosen = {name: getattr(self, name) for name in names}
        for name in IDS:
            chosen[name] = np.asarray(chosen[name], np.int32) if chosen[name] else None
        return Filters(**chosen)

    def check_ids(self, vocab_size: int) -> None:
        """ValueError for a banned or forced id outside the vocabulary, or when all are banned."""
        for name in IDS:
            outside = [i for i in getattr(self, name) if not 0 <= i < vocab_size]
            if outside:
                raise ValueError(
                    f"sampling: {name} holds {outside[0]}; ids are 0..{vocab_size - 1}"
                )
        if len(set(self.banned_ids)) == vocab_size:
            raise ValueError(f"sampling: banned_ids holds all {vocab_size} ids of the vocabulary")


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
    typical_p: float | Array | None = None
    epsilon: float | Array | None = None
    eta: float | Array | None = None
    no_repeat_ngram: int | None = struct.field(pytree_node=False, default=None)
    banned_ids: Array | None = None
    forced_ids: Array | None = None


def choose(
    logits: Array,
    filters: Filters,
    keys: Array,
    past: Past | None = None,
    said: Array | None = None,
) -> Array:
    """One token a row, [B] int32, from logits [B, V] and one key a row.

    `past` and `said` as for `filtered`. A row's choice depends on its own logits and key alone.
    """
    logits = filtered(logits, filters, past, said)
    if filters.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filtered(
    logits: Array, filters: Filters, past: Past | None = None, said: Array | None = None
) -> Array:
    """Logits [B, V] after all filters, float32.

    `past` is prompt and answer so far, for the repetition penalty and repeated n-grams; `said` [B]
    the number of new tokens before this one, for forced tokens. ValueError when one is needed and
    not given.
    """
    logits = processed(logits.astype(jnp.float32), filters, past, said)
    if filters.temperature is not None:
        logits = logits / filters.temperature
    for value, keep in (
        (filters.top_k, keep_top_k),
        (filters.top_p, keep_top_p),
        (filters.min_p, keep_min_p),
        (filters.typical_p, keep_typical),
        (filters.epsilon, keep_epsilon),
        (filters.eta, keep_eta),
    ):
        if value is not None:
            logits = keep(logits, value)
    return logits


def processed(
    logits: Array, filters: Filters, past: Past | None = None, said: Array | None = None
) -> Array:
    """Logits [B, V] after the filters that greedy decoding and beam search have too."""
    looks_back = filters.repetition_penalty is not None or filters.no_repeat_ngram is not None
    if looks_back and past is None:
        raise ValueError("the repetition penalty and no_repeat_ngram need `past`")
    if filters.repetition_penalty is not None:
        seen = mark(past.tokens, past.real, logits.shape[-1])
        logits = penalise_repetition(logits, seen, filters.repetition_penalty)
    if filters.banned_ids is not None:
        logits = ban(logits, filters.banned_ids)
    if filters.no_repeat_ngram is not None:
        logits = ban_repeated(logits, past, filters.no_repeat_ngram)
    if filters.forced_ids is not None:
        if said is None:
            raise ValueError("forced tokens need `said`, the number of tokens before this one")
        logits = force(logits, filters.forced_ids, said)
    return logits


def log_prob(logits: Array, tokens: Array) -> Array:
    """log p of `tokens` [B] under the unmodified logits [B, V]: no temperature, no filter."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
