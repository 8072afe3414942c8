"""Contrastive search: likely, and unlike what was said before (Su et al. 2022, arXiv:2202.06417).

Of the k most likely tokens the one is said that has the largest

    (1 - alpha) p(v | x) - alpha max_j cos(h_v, h_j)                                     eq. 5

where h_v is the state that the model reaches with v, and h_j are those of all tokens so far, the
prompt's included. States are those that the head multiplies. The k candidates are k rows of the
cache, of which the chosen one's row becomes all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from research.decode.beam import pick, reorder
from research.decode.generate import Generation, finished, for_decoding, in_layers
from research.decode.prompts import bucket, check_prompts, left_padded, readable
from research.models.attention import Cache
from research.models.decoder import Decoder
from research.types import Array, Params


@dataclass(frozen=True)
class Contrastive:
    """alpha 0, or one candidate, is greedy search."""

    top_k: int = 4
    alpha: float = 0.6
    max_tokens: int = 128
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("top_k", "max_tokens"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"contrastive: {name} must be at least 1, got {value}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"contrastive: alpha must be in [0, 1], got {self.alpha}")


@struct.dataclass
class State:
    """Between two tokens, for B prompts and K candidates; the cache has B·K rows, prompt by prompt,
    those of a prompt alike. Tokens stand in the slots of the cache, as in `generate`."""

    cache: Cache
    tokens: Array  # [B, S]
    log_probs: Array  # [B, S], of the answer
    directions: Array  # [B, S, D], the states of `tokens` at length 1; 0 where there is none
    logits: Array  # [B, V] of the next token
    lengths: Array  # [B], of the answer
    ended: Array  # [B] bool
    step: Array  # number of new tokens


def contrastive_search(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    search: Contrastive = Contrastive(),
    pad_id: int = 0,
) -> Generation:
    """Continue every prompt by up to `search.max_tokens` tokens.

    `params` may come as `for_decoding` gives them. PromptError says which prompt is empty, outside
    the vocabulary, or too long for the context; ValueError when there are more candidates than
    tokens.
    """
    config = model.config
    limits = config.max_length, search.max_tokens
    check_prompts(prompts, readable(params), *limits, config.position.missing, model.before)
    if search.top_k > config.vocab_size:
        raise ValueError(
            f"contrastive: top_k is {search.top_k}, the vocabulary has {config.vocab_size} tokens"
        )
    width = bucket(max(len(prompt) for prompt in prompts))
    tokens, segments = left_padded(prompts, width, pad_id)
    params = params if in_layers(params) else for_decoding(params)
    slots = bucket(width + search.max_tokens, least=64, steps=2)
    state = begin(model, params, tokens, segments, search.top_k, slots, pad_id)
    stop = jnp.asarray(search.stop_ids, jnp.int32)
    state = advance(
        model, params, state, search.top_k, search.alpha, stop, search.max_tokens, pad_id
    )
    return finished(state, width, search.max_tokens)


@partial(jax.jit, static_argnames=("model", "top_k", "slots"))
def begin(
    model: Decoder,
    params: Params,
    tokens: Array,
    segments: Array,
    top_k: int,
    slots: int,
    pad_id: int,
) -> State:
    """Read the prompts [B, P], once each."""
    (B, P), D = tokens.shape, model.config.width
    cache = model.apply({"params": params}, B, slots, stacked=False, method="start")
    states, cache = model.apply(
        {"params": params}, tokens, segment_ids=segments, cache=cache, method="hidden"
    )
    known = jnp.where(segments[..., None] == 0, 0, unit(states))
    return State(
        cache=reorder(cache, jnp.repeat(jnp.arange(B), top_k)),
        tokens=jnp.full((B, slots), pad_id, jnp.int32).at[:, :P].set(tokens),
        log_probs=jnp.zeros((B, slots), jnp.float32),
        directions=jnp.zeros((B, slots, D), jnp.float32).at[:, :P].set(known),
        logits=model.apply({"params": params}, states[:, -1], method="project"),
        lengths=jnp.zeros(B, jnp.int32),
        ended=jnp.zeros(B, bool),
        step=jnp.zeros((), jnp.int32),
    )


@partial(jax.jit, static_argnames=("model", "top_k"), donate_argnames="state")
def advance(
    model: Decoder,
    params: Params,
    state: State,
    top_k: int,
    alpha: float,
    stop: Array,
    limit: int,
    pad_id: int,
) -> State:
    """Search until `limit` tokens are there or every row has ended."""

    def step(state: State) -> State:
        log_p = jax.nn.log_softmax(state.logits, axis=-1)
        values, candidates = lax.top_k(log_p, top_k)
        present = state.cache.segment_ids[::top_k] != 0
        states, cache = model.apply(
            {"params": params}, candidates.reshape(-1, 1), cache=state.cache, method="hidden"
        )
        states = states.reshape(*candidates.shape, -1)
        alike = similarity(unit(states), state.directions, present)
        best = jnp.argmax((1 - alpha) * jnp.exp(values) - alpha * alike, axis=-1)
        rows = jnp.repeat(best + top_k * jnp.arange(best.size), top_k)
        chosen = pick(states, best[:, None])[:, 0]
        said = [jnp.take_along_axis(each, best[:, None], axis=1) for each in (candidates, values)]
        state = say(state, *said, unit(chosen), stop, pad_id)
        logits = model.apply({"params": params}, chosen, method="project")
        return state.replace(cache=reorder(cache, rows), logits=logits)

    return lax.while_loop(lambda s: (s.step < limit) & ~s.ended.all(), step, state)


def say(
    state: State, token: Array, log_p: Array, direction: Array, stop: Array, pad_id: int
) -> State:
    """One token [B, 1] more, its log-probability [B, 1] and its direction [B, D]; rows that have
    ended get padding."""
    running = ~state.ended
    put = partial(lax.dynamic_update_slice_in_dim, start_index=state.cache.index, axis=1)
    return state.replace(
        tokens=put(state.tokens, jnp.where(running[:, None], token, pad_id)),
        log_probs=put(state.log_probs, jnp.where(running[:, None], log_p, 0)),
        directions=put(state.directions, direction[:, None]),
        lengths=state.lengths + running,
        ended=state.ended | (token == stop).any(-1),
        step=state.step + 1,
    )


def similarity(candidates: Array, directions: Array, present: Array) -> Array:
    """The largest cosine of each candidate [B, K, D] with the present ones of [B, S, D] -> [B, K]."""
    cosine = jnp.einsum("bkd,bsd->bks", candidates, directions)
    return jnp.where(present[:, None], cosine, -jnp.inf).max(-1)


def unit(states: Array) -> Array:
    """Of length 1, float32."""
    states = states.astype(jnp.float32)
    return states / jnp.maximum(jnp.linalg.norm(states, axis=-1, keepdims=True), 1e-12)
