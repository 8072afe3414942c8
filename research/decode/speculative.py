"""Speculative decoding: a draft proposes tokens, the model reads them at once and keeps a beginning.

Leviathan et al. 2023 (arXiv:2211.17192, Algorithm 1) and Chen et al. 2023 (arXiv:2302.01318,
Algorithm 2). With p the model's distribution and q the draft's, both after the same filters, a
drafted token d is kept with probability min(1, p(d) / q(d)); at the first that is not, one is drawn
from (p − q)₊ normalised; after all are kept, one more from p. What is said then has exactly the
distribution of p, whatever the draft. Greedy is the case of one-hot p.

The drafts are in `drafts`. One prompt at a time: rows of a batch would keep different numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from research.decode.drafts import DraftModel, Lookup, Proposal, Text, distribution, draw, rollback
from research.decode.generate import Generation, for_decoding, in_layers, prefill
from research.decode.prompts import (
    PromptError,
    bucket,
    check_prompts,
    left_padded,
    preceded,
    readable,
)
from research.decode.sampling import Filters, Sampling
from research.models.attention import Cache
from research.models.decoder import Decoder
from research.types import Array, Params


@dataclass(frozen=True)
class Speculation:
    """A `Generation` of one row, and what it took.

    rounds     forward passes of the model, after that of the prompt
    proposed   tokens that the draft proposed
    accepted   of these, how many are in the answer
    """

    generation: Generation
    rounds: int
    proposed: int
    accepted: int

    @property
    def tokens_per_round(self) -> float:
        return int(self.generation.lengths[0]) / self.rounds


@struct.dataclass
class State:
    """Between two rounds. The cache is read up to text.end - 1: the last token is not in it yet."""

    cache: Cache
    draft: Any
    text: Text
    log_probs: Array  # [S]
    key: Array
    ended: Array  # bool
    rounds: Array
    proposed: Array
    accepted: Array


def speculate(
    model: Decoder,
    params: Params,
    prompt: Sequence[int],
    rng: Array,
    sampling: Sampling = Sampling(),
    draft: Lookup | DraftModel = Lookup(),
    draft_params: Params = None,
    pad_id: int = 0,
) -> Speculation:
    """Continue one prompt by up to `sampling.max_tokens` tokens, distributed as `generate`'s are.

    Greedy it gives the same tokens, up to ties that rounding decides. PromptError as there, the
    context having to hold `draft.count` tokens more; ValueError for a draft model of another
    vocabulary.
    """
    config = model.config
    limits = config.max_length, sampling.max_tokens
    check_prompts([prompt], readable(params), *limits, config.position.missing, model.before)
    sampling.check_ids(config.vocab_size)
    check_draft(draft, draft_params, config.vocab_size, len(prompt) + sampling.max_tokens)
    if isinstance(draft, DraftModel):
        needs = draft.model.config.position.missing, draft.model.before
        check_prompts([prompt], readable(draft_params), *limits, *needs)
    if model.before + len(prompt) + sampling.max_tokens + draft.count > config.max_length:
        raise PromptError(
            f"{preceded(model.before)}the prompt has {len(prompt)} tokens, max_tokens is "
            f"{sampling.max_tokens} and the draft proposes {draft.count}: together more than the "
            f"context of {config.max_length}"
        )
    width = bucket(len(prompt))
    tokens, segments = left_padded([prompt], width, pad_id)
    params, draft_params = (
        p if p is None or in_layers(p) else for_decoding(p) for p in (params, draft_params)
    )
    stop = jnp.asarray(sampling.stop_ids, jnp.int32)
    slots = bucket(width + sampling.max_tokens + draft.count, least=64, steps=2)
    state = read(model, params, draft, draft_params, tokens, segments, rng, slots)
    limit = width + sampling.max_tokens
    state = advance(model, params, draft, draft_params, state, sampling.filters, stop, width, limit)
    return finished(state, width, limit, pad_id)


def check_draft(draft: Lookup | DraftModel, params: Params, vocab_size: int, longest: int) -> None:
    """ValueError unless a draft model has its parameters, the vocabulary, and room."""
    if not isinstance(draft, DraftModel):
        if params is not None:
            raise ValueError(f"{type(draft).__name__} has no parameters, but draft_params is given")
        return
    config = draft.model.config
    if params is None:
        raise ValueError("a draft model needs draft_params")
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"the draft model has {config.vocab_size} tokens, the model {vocab_size}: expected one "
            f"vocabulary"
        )
    before = draft.model.before
    if before + longest + draft.count > config.max_length:
        raise PromptError(
            f"{preceded(before)}prompt, max_tokens and drafts come to {longest + draft.count} "
            f"tokens, more than the draft model's context of {config.max_length}"
        )


@partial(jax.jit, static_argnames=("model", "draft", "slots"))
def read(
    model: Decoder,
    params: Params,
    draft: Lookup | DraftModel,
    draft_params: Params,
    tokens: Array,
    segments: Array,
    key: Array,
    slots: int,
) -> State:
    """The prompt [1, P] in both caches."""
    zero, P = jnp.zeros((), jnp.int32), tokens.shape[1]
    start = (segments == 0).sum(dtype=jnp.int32)
    whole = jnp.zeros(slots, jnp.int32).at[:P].set(tokens[0])
    return State(
        cache=prefill(model, params, tokens, segments, slots)[1],
        draft=draft.read(draft_params, tokens, segments, slots),
        text=Text(whole, start, jnp.asarray(P, jnp.int32)),
        log_probs=jnp.zeros(slots, jnp.float32),
        key=key,
        ended=jnp.zeros((), bool),
        rounds=zero,
        proposed=zero,
        accepted=zero,
    )


@partial(jax.jit, static_argnames=("model", "draft"), donate_argnames="state")
def advance(
    model: Decoder,
    params: Params,
    draft: Lookup | DraftModel,
    draft_params: Params,
    state: State,
    filters: Filters,
    stop: Array,
    first: int,
    limit: int,
) -> State:
    """Round after round until a stop id or `limit`; the answer begins in slot `first`."""

    def one(state: State) -> State:
        key = jax.random.fold_in(state.key, state.rounds)
        keys = jax.random.split(key)
        said, V = state.text.end - first, model.config.vocab_size
        proposal, remembered = draft.propose(
            draft_params, state.draft, state.text, filters, said, V, keys[0]
        )
        state = state.replace(draft=remembered)
        logits, state = verify(model, params, state, proposal)
        places = jnp.arange(draft.count + 1)
        past = state.text.past(state.text.end + places)
        p = distribution(logits, filters, past, said + places)
        kept, new = accept(keys[1], p, proposal)
        return extended(state, kept, new, logits, proposal, stop, limit)

    return lax.while_loop(lambda s: ~s.ended & (s.text.end < limit), one, state)


def verify(model: Decoder, params: Params, state: State, proposal: Proposal) -> tuple[Array, State]:
    """Logits [count + 1, V] after the last token and after each proposal, and these in the text."""
    text = state.text
    last = lax.dynamic_slice_in_dim(text.tokens, text.end - 1, 1)
    window = jnp.concatenate([last, proposal.tokens])
    cache = rollback(state.cache, text.end - 1)
    logits, cache = model.apply({"params": params}, window[None], cache=cache)
    tokens = lax.dynamic_update_slice_in_dim(text.tokens, proposal.tokens, text.end, axis=0)
    return logits[0], state.replace(cache=cache, text=text.replace(tokens=tokens))


def accept(key: Array, p: Array, proposal: Proposal) -> tuple[Array, Array]:
    """How many proposals are kept, and the token drawn after them.

    p [count + 1, V] is the model's distribution at every place.
    """
    count = proposal.tokens.shape[0]
    keys = jax.random.split(key)
    at = jnp.arange(count), proposal.tokens
    passes = jax.random.uniform(keys[0], (count,)) * proposal.q[at] < p[at]
    kept = jnp.cumprod((passes & proposal.valid).astype(jnp.int32)).sum()
    q = jnp.concatenate([proposal.q, jnp.zeros_like(p[:1])])
    rest = jnp.maximum(p[kept] - q[kept], 0)
    # Nothing is left where p and q are equal up to rounding.
    return kept, draw(keys[1], jnp.where(rest.sum() > 0, rest, p[kept]))


def extended(
    state: State,
    kept: Array,
    new: Array,
    logits: Array,
    proposal: Proposal,
    stop: Array,
    limit: int,
) -> State:
    """The state with `kept` proposals and the `new` token, cut at a stop id or the limit."""
    text, places = state.text, jnp.arange(logits.shape[0])
    tokens = jnp.where(places < kept, jnp.append(proposal.tokens, 0), new)
    stops = (tokens[:, None] == stop).any(-1) & (places <= kept)
    ended, cut = stops.any(), jnp.argmax(stops) + 1
    more = jnp.minimum(jnp.where(ended, cut, kept + 1), limit - text.end)
    log_probs = jax.nn.log_softmax(logits, axis=-1)[places, tokens]
    put = partial(lax.dynamic_update_slice_in_dim, start_index=text.end, axis=0)
    return state.replace(
        text=text.replace(tokens=put(text.tokens, tokens), end=text.end + more),
        log_probs=put(state.log_probs, log_probs),
        ended=ended & (cut <= more),
        rounds=state.rounds + 1,
        proposed=state.proposed + proposal.valid.sum(),
        accepted=state.accepted + jnp.minimum(kept, more),
    )


def finished(state: State, first: int, limit: int, pad_id: int) -> Speculation:
    state = jax.device_get(state.replace(cache=None, draft=None, key=None))
    length = int(state.text.end) - first
    tokens = np.full((1, limit - first), pad_id, np.int32)
    log_probs = np.zeros((1, limit - first), np.float32)
    answer = slice(first, first + length)
    tokens[0, :length], log_probs[0, :length] = state.text.tokens[answer], state.log_probs[answer]
    said = Generation(tokens, np.array([length], np.int32), log_probs)
    return Speculation(said, int(state.rounds), int(state.proposed), int(state.accepted))
