"""Beam search with a key/value cache, the whole of it under two jits.

Scores, order and end are those of Hugging Face's `generate(num_beams=K, do_sample=False)` in
transformers 5. In each step the best (1 + stop ids)·K continuations of a row's K running beams are
taken, at least 2K. Those among the first K that meet a stop id, or the limit, are finished, with
the score

    Σ log p / length^length_penalty       length: new tokens, the stop id included

of which a row keeps the best K; the best K that have not met a stop id run on. One beam is greedy
search. Freitag and Al-Onaizan 2017 (arXiv:1702.01806) describe the search; the division by the
length is that of Wu et al. 2016 (arXiv:1609.08144), eq. 14, without its constants.

Differs from Hugging Face: beams that do not exist have a score of -inf, not -1e9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from research.decode.generate import for_decoding, in_layers, past, prefill
from research.decode.prompts import bucket, check_prompts, left_padded, readable
from research.decode.sampling import Filters, processed
from research.models.attention import Cache
from research.models.decoder import Decoder
from research.types import Array, Params


@dataclass(frozen=True)
class Beams:
    """early_stopping: when a row that has `beams` finished sequences is done.

    True     at once
    False    when the best running beam, scored at its present length, is no better than the worst
             of them: a heuristic where length_penalty is not 0, as a score may still rise
    "never"  when it could be no better at the length, up to the limit, that is kindest to it
    """

    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    n_best: int = 1
    no_repeat_ngram: int | None = None
    max_tokens: int = 128
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        least = 1
        for name in ("beams", "n_best", "no_repeat_ngram", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"beams: {name} must be at least {least}, got {value}")
        if self.n_best > self.beams:
            raise ValueError(f"beams: n_best is {self.n_best}, more than the {self.beams} beams")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"beams: early_stopping must be True, False or 'never', got {self.early_stopping!r}"
            )

    def check(self, vocab_size: int) -> None:
        """ValueError when there are fewer sequences than beams, or too few tokens to go on with."""
        if self.beams > vocab_size**self.max_tokens:
            raise ValueError(
                f"beams: {self.beams} beams, but only {vocab_size**self.max_tokens} sequences of "
                f"{self.max_tokens} tokens over a vocabulary of {vocab_size}"
            )
        if self.width > self.beams * vocab_size:
            raise ValueError(
                f"beams: {len(self.stop_ids)} stop ids leave too little of a vocabulary of "
                f"{vocab_size} to go on with"
            )

    @property
    def width(self) -> int:
        """Continuations of a row that are looked at in each step."""
        return max(2, 1 + len(self.stop_ids)) * self.beams


@dataclass(frozen=True)
class BeamResult:
    """The best sequences of each prompt, best first.

    tokens   [B, n_best, max_tokens] int32, `pad_id` after an end
    lengths  [B, n_best] int32, the stop token included; 0 where fewer were found
    scores   [B, n_best] float32, Σ log p / length^length_penalty; -inf where fewer were found
    """

    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray

    def rows(self) -> list[list[int]]:
        """The best of each prompt, its ids up to its end."""
        return [row[0, : n[0]].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


@struct.dataclass
class Rules:
    """The numbers of a search. A `limit` of new tokens; early_stopping True as `early`, "never" as
    `never`."""

    beams: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    filters: Filters
    stop: Array  # [stop ids]
    length_penalty: float | Array
    early: bool | Array
    never: bool | Array
    limit: int | Array
    pad_id: int | Array


@struct.dataclass
class State:
    """Between two tokens, for B prompts and K beams; the cache has B·K rows, prompt by prompt.

    Tokens stand in the slots of the cache, as in `generate`.
    """

    cache: Cache
    tokens: Array  # [B, K, S] of the running beams
    scores: Array  # [B, K], Σ log p, best first
    done: Array  # [B, K, S], finished sequences
    done_scores: Array  # [B, K], divided by the lengths; best first, -inf where there is none
    done_lengths: Array  # [B, K]
    open: Array  # [B] bool: a running beam may still get in
    step: Array  # number of new tokens


def beam_search(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    search: Beams = Beams(),
    pad_id: int = 0,
) -> BeamResult:
    """The `n_best` continuations of each prompt that a search finds.

    What is found for a prompt does not depend on the prompts beside it. `params` may come as
    `for_decoding` gives them. PromptError says which prompt is empty, outside the vocabulary, or too
    long for the context; ValueError when there are more beams than sequences.
    """
    config = model.config
    limits = config.max_length, search.max_tokens
    check_prompts(prompts, readable(params), *limits, config.position.missing, model.before)
    search.check(config.vocab_size)
    width = bucket(max(len(prompt) for prompt in prompts))
    tokens, segments = left_padded(prompts, width, pad_id)
    params = params if in_layers(params) else for_decoding(params)
    rules = rules_of(search, pad_id)
    slots = bucket(width + search.max_tokens, least=64, steps=2)
    state = begin(model, params, tokens, segments, rules, slots)
    return result(advance(model, params, state, rules), search, width)


def rules_of(search: Beams, pad_id: int) -> Rules:
    return Rules(
        search.beams,
        search.width,
        Filters(no_repeat_ngram=search.no_repeat_ngram),
        jnp.asarray(search.stop_ids, jnp.int32),
        search.length_penalty,
        search.early_stopping is True or search.beams == 1,
        search.early_stopping == "never",
        search.max_tokens,
        pad_id,
    )


def result(state: State, search: Beams, width: int) -> BeamResult:
    """The finished sequences, which begin in slot `width`."""
    found = jax.device_get((state.done, state.done_lengths, state.done_scores))
    done, lengths, scores = (array[:, : search.n_best] for array in found)
    return BeamResult(done[:, :, width : width + search.max_tokens], lengths, scores)


@partial(jax.jit, static_argnames=("model", "slots"))
def begin(
    model: Decoder, params: Params, tokens: Array, segments: Array, rules: Rules, slots: int
) -> State:
    """Read the prompts [B, P], once each, and take the first step."""
    logits, cache = prefill(model, params, tokens, segments, slots)
    return start(logits, cache, jnp.asarray(tokens), rules)


def start(logits: Array, cache: Cache, tokens: Array, rules: Rules) -> State:
    """After the first step: logits [B, V] that follow `tokens` [B, P], which the cache holds."""
    (B, P), K, slots = tokens.shape, rules.beams, cache.segment_ids.shape[1]
    empty = jnp.full((B, K, slots), rules.pad_id, jnp.int32)
    state = State(
        cache=reorder(cache, jnp.repeat(jnp.arange(B), K)),
        tokens=empty.at[:, :, :P].set(tokens[:, None]),
        # All beams are the same yet: one counts.
        scores=jnp.full((B, K), -jnp.inf).at[:, 0].set(0),
        done=empty,
        done_scores=jnp.full((B, K), -jnp.inf),
        done_lengths=jnp.zeros((B, K), jnp.int32),
        open=jnp.ones(B, bool),
        step=jnp.zeros((), jnp.int32),
    )
    return expand(state, jnp.repeat(logits, K, axis=0), rules)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def advance(model: Decoder, params: Params, state: State, rules: Rules) -> State:
    """Search until the limit, or until no row is open."""

    def step(state: State) -> State:
        slot, rows = state.cache.index, state.tokens.reshape(-1, state.tokens.shape[-1])
        last = lax.dynamic_slice_in_dim(rows, slot, 1, axis=1)
        logits, cache = model.apply({"params": params}, last, cache=state.cache)
        return expand(state.replace(cache=cache), logits[:, 0], rules)

    return lax.while_loop(lambda s: (s.step < rules.limit) & s.open.any(), step, state)


def expand(state: State, logits: Array, rules: Rules) -> State:
    """The state after one more token from logits [B·K, V]."""
    B, K, S = state.tokens.shape
    V, slot = logits.shape[-1], state.cache.index
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_p = processed(log_p, rules.filters, past(state.tokens.reshape(B * K, S), state.cache))
    totals = state.scores[:, :, None] + log_p.reshape(B, K, V)
    scores, chosen = lax.top_k(totals.reshape(B, K * V), rules.width)
    beam, token = chosen // V, (chosen % V).astype(jnp.int32)
    tokens = pick(state.tokens, beam).at[:, :, slot].set(token)
    step = state.step + 1
    ends = (token[..., None] == rules.stop).any(-1) | (step >= rules.limit)
    state = finish(state.replace(step=step), tokens, scores, ends, rules)
    scores, best = lax.top_k(jnp.where(ends, -jnp.inf, scores), K)
    source = jnp.take_along_axis(beam, best, axis=1) + K * jnp.arange(B)[:, None]
    state = state.replace(
        cache=reorder(state.cache, source.reshape(-1)), tokens=pick(tokens, best), scores=scores
    )
    return state.replace(open=state.open & improvable(state, rules))


def finish(state: State, tokens: Array, scores: Array, ends: Array, rules: Rules) -> State:
    """Those of the continuations [B, width] that end, and are among the first K, come in."""
    K = rules.beams
    full = jnp.isfinite(state.done_scores).all(-1, keepdims=True)
    first = jnp.arange(rules.width) < K
    comes = ends & first & state.open[:, None] & ~(full & rules.early)
    new = scores / state.step.astype(jnp.float32) ** rules.length_penalty
    all_scores = jnp.concatenate([state.done_scores, jnp.where(comes, new, -jnp.inf)], axis=1)
    lengths = jnp.where(jnp.isfinite(new) & comes, state.step, 0)
    best_scores, best = lax.top_k(all_scores, K)
    return state.replace(
        done=pick(jnp.concatenate([state.done, tokens], axis=1), best),
        done_scores=best_scores,
        done_lengths=jnp.take_along_axis(
            jnp.concatenate([state.done_lengths, lengths], axis=1), best, axis=1
        ),
    )


def improvable(state: State, rules: Rules) -> Array:
    """[B] bool: whether a running beam may still get into a row's finished ones."""
    full = jnp.isfinite(state.done_scores).all(-1)
    at_limit = jnp.asarray(rules.never) & (jnp.asarray(rules.length_penalty) > 0)
    length = jnp.where(at_limit, rules.limit, state.step).astype(jnp.float32)
    best = state.scores[:, 0] / length**rules.length_penalty
    return jnp.isfinite(best) & (
        ~full | (~jnp.asarray(rules.early) & (best > state.done_scores[:, -1]))
    )


def pick(rows: Array, chosen: Array) -> Array:
    """rows [B, K, S], chosen [B, n] -> [B, n, S]."""
    return jnp.take_along_axis(rows, chosen[..., None], axis=1)


def reorder(cache: Cache, rows: Array) -> Cache:
    """A cache of separate layers whose row i is what row rows[i] was."""
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=0) if a.ndim else a, cache)
