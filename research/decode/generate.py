"""Generation with a key/value cache: ragged prompts in one batch, the whole loop under one jit.

A prompt batch is padded on the left to a size bucket and read at once; then one compiled loop
draws token after token until every row has met a stop id or the limit. Streaming stops the same
loop every few tokens, so it gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from research.decode.answers import Trie
from research.decode.filters import Past
from research.decode.prompts import bucket, check_prompts, left_padded, readable
from research.decode.sampling import Filters, Sampling, choose, log_prob
from research.models.attention import Cache
from research.models.decoder import Decoder, unstack
from research.types import Array, Params
from research.weights.base import is_weight
from research.weights.int8 import QuantizedInputs
from research.weights.outliers import Decomposed
from research.weights.quantized import is_quantized
from research.weights.transposed import transpose

# Called with the new ids of every row, [] for a row that has ended.
Callback = Callable[[list[list[int]]], Any]


@dataclass(frozen=True)
class Generation:
    """What was generated, without the prompts.

    tokens     [B, max_tokens] int32, `pad_id` after a row's end
    lengths    [B] int32, the stop token included
    log_probs  [B, max_tokens] float32, log p of each token under the model as it is (before
               temperature, penalty and filters); 0 after a row's end
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray

    def rows(self) -> list[list[int]]:
        """Each row's ids up to its end."""
        pairs = zip(self.tokens, self.lengths, strict=True)
        return [row[:length].tolist() for row, length in pairs]


@struct.dataclass
class State:
    """Between two tokens. S, the slots of the cache, are enough for prompt and answer.

    What the cache does not hold yet is the last token: it stands at the cache's index.
    """

    cache: Cache
    tokens: Array  # [B, S], each in its slot of the cache: padding, prompt, answer
    log_probs: Array  # [B, S], of the answer
    lengths: Array  # [B], of the answer
    ended: Array  # [B] bool
    nodes: Array | None  # [B], where in the trie of answers, if there is one
    keys: Array  # [B]
    step: Array  # number of tokens drawn


def generate(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    rng: Array,
    sampling: Sampling = Sampling(),
    pad_id: int = 0,
    callback: Callback | None = None,
    stream_every: int = 1,
    among: Trie | None = None,
    width: int | None = None,
) -> Generation:
    """Continue every prompt by up to `sampling.max_tokens` tokens.

    Row i draws with fold_in(rng, i), or with rng[i] when `rng` holds a key for each row: what a
    row says depends on its prompt and key, not on the rows beside it. With a `callback` the new
    ids are handed over every `stream_every` tokens. `params` may come as `for_decoding` gives
    them, which saves a copy of the parameters in every call. With `among` every answer is one of
    the trie's, and a row ends where its answer does. PromptError says which prompt is empty,
    outside the vocabulary, or too long for the context; ValueError which number of the sampling
    does not fit the vocabulary or the trie. Prompts are padded to `width` tokens, by default to a
    bucket that holds the longest: with a width of its own a caller compiles once for all batches.
    """
    config = model.config
    context, missing = config.max_length, config.position.missing
    check_prompts(prompts, readable(params), context, sampling.max_tokens, missing, model.before)
    sampling.check_ids(config.vocab_size)
    if among is not None:
        among.check(config.vocab_size, sampling.max_tokens)
        among.check_rules(sampling.banned_ids, sampling.forced_ids)
    every = sampling.max_tokens if callback is None else stream_every
    if every < 1:
        raise ValueError(f"stream_every must be at least 1, got {stream_every}")
    longest = max(len(prompt) for prompt in prompts)
    if width is not None and width < longest:
        raise ValueError(f"width is {width}, and the longest prompt has {longest} tokens")
    width = bucket(longest) if width is None else width
    tokens, segments = left_padded(prompts, width, pad_id)
    params = params if in_layers(params) else for_decoding(params)
    stop, filters = jnp.asarray(sampling.stop_ids, jnp.int32), sampling.filters
    # Coarse, as the loop is compiled for every number of slots.
    slots = bucket(width + sampling.max_tokens, least=64, steps=2)
    keys = row_keys(rng, len(prompts))
    state = read(model, params, tokens, segments, keys, filters, stop, slots, pad_id, among)
    told = 0
    while True:
        limit = min(told + every, sampling.max_tokens)
        state = advance(model, params, state, filters, stop, limit, pad_id, among)
        if callback is not None:
            callback(new_ids(state, width, told))
        told = limit
        if told == sampling.max_tokens or bool(state.ended.all()):
            return finished(state, width, sampling.max_tokens)


def for_decoding(params: Params, donate: bool = False, dense: bool = True) -> Params:
    """Parameters as decoding reads them fastest, a copy: one tree a layer (a scanned stack is read
    through a copy in every step) and, on a CPU, the matrices transposed. With `donate` the stacks of
    `params` are given up on the way, and no two copies of them exist together.

    With `dense` matrices of few bits are made dense here, once, on a CPU. Without it they are small
    between calls, but every call of `generate` unpacks them before its first token: XLA takes that out
    of the loop over tokens, and holds a dense model's memory meanwhile (docs/PERFORMANCE.md).
    """
    if jax.default_backend() != "cpu":
        return unstack(params, donate=donate)
    change = partial(transpose, dense=dense)
    layers = unstack(params, change, donate)
    if "head" in layers:
        layers["head"] = change(layers["head"])
    if dense and "embed" in layers:
        layers["embed"] = jax.tree.map(_dense_table, layers["embed"], is_leaf=is_weight)
    return layers


def _dense_table(w: Any) -> Any:
    if is_quantized(w):
        return w.dense()
    adapter = (
        is_weight(w) and hasattr(w, "base") and not isinstance(w, QuantizedInputs | Decomposed)
    )
    return w.replace(base=_dense_table(w.base)) if adapter else w


def in_layers(params: Params) -> bool:
    """Whether they have the form that `for_decoding` or `unstack` gives."""
    stacks = [value for name, value in params.items() if name.startswith("stack_")]
    return all(isinstance(stack, tuple) for stack in stacks)


def row_keys(rng: Array, rows: int) -> Array:
    if rng.ndim == 0:
        return jax.vmap(partial(jax.random.fold_in, rng))(jnp.arange(rows))
    if rng.shape != (rows,):
        raise ValueError(f"rng: expected one key or {rows} keys, got shape {rng.shape}")
    return rng


@partial(jax.jit, static_argnames=("model", "slots"))
def read(
    model: Decoder,
    params: Params,
    tokens: Array,
    segments: Array,
    keys: Array,
    filters: Filters,
    stop: Array,
    slots: int,
    pad_id: int,
    among: Trie | None = None,
) -> State:
    """Read the prompts [B, P] into a cache of `slots` slots and draw the first token."""
    B, P = tokens.shape
    logits, cache = prefill(model, params, tokens, segments, slots)
    state = State(
        cache=cache,
        tokens=jnp.full((B, slots), pad_id, jnp.int32).at[:, :P].set(tokens),
        log_probs=jnp.zeros((B, slots), jnp.float32),
        lengths=jnp.zeros(B, jnp.int32),
        ended=jnp.zeros(B, bool),
        nodes=None if among is None else jnp.zeros(B, jnp.int32),
        keys=keys,
        step=jnp.zeros((), jnp.int32),
    )
    return draw(state, logits, filters, stop, pad_id, among)


def prefill(
    model: Decoder, params: Params, tokens: Array, segments: Array, slots: int | None
) -> tuple[Array, Cache]:
    """Left-padded prompts [B, P] in a cache of `slots` slots, None: without an end, and the logits
    [B, V] that follow."""
    cache = model.apply({"params": params}, tokens.shape[0], slots, stacked=False, method="start")
    hidden, cache = model.apply(
        {"params": params}, tokens, segment_ids=segments, cache=cache, method="hidden"
    )
    # Left padding: the last column holds every row's last token.
    return model.apply({"params": params}, hidden[:, -1], method="project"), cache


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def advance(
    model: Decoder,
    params: Params,
    state: State,
    filters: Filters,
    stop: Array,
    limit: int,
    pad_id: int,
    among: Trie | None = None,
) -> State:
    """Draw until `limit` tokens are there or every row has ended."""

    def wanted(state: State) -> Array:
        return (state.step < limit) & ~state.ended.all()

    def step(state: State) -> State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.cache.index, 1, axis=1)
        logits, cache = model.apply({"params": params}, last, cache=state.cache)
        return draw(state.replace(cache=cache), logits[:, 0], filters, stop, pad_id, among)

    return lax.while_loop(wanted, step, state)


def draw(
    state: State, logits: Array, filters: Filters, stop: Array, pad_id: int, among: Trie | None
) -> State:
    """The state after one more token from logits [B, V]; rows that have ended get padding."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    slot, said = state.cache.index, jnp.broadcast_to(state.step, state.lengths.shape)
    allowed = logits if among is None else among.keep(logits, state.nodes)
    token = choose(allowed, filters, keys, past(state.tokens, state.cache), said)
    running = ~state.ended
    value = jnp.where(running, log_prob(logits, token), 0)
    ended = state.ended | (token[:, None] == stop).any(-1)
    nodes = state.nodes
    if among is not None:
        nodes = among.follow(nodes, token)
        ended |= among.complete(nodes)
    put = partial(lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    return state.replace(
        tokens=put(state.tokens, jnp.where(running, token, pad_id)[:, None]),
        log_probs=put(state.log_probs, value[:, None]),
        lengths=state.lengths + running,
        ended=ended,
        nodes=nodes,
        step=state.step + 1,
    )


def past(tokens: Array, cache: Cache) -> Past:
    """Of `tokens` [B, S], each in its slot, those that the cache holds."""
    end = jnp.broadcast_to(cache.index, cache.lengths.shape)
    return Past(tokens, end - cache.lengths, end)


def new_ids(state: State, width: int, told: int) -> list[list[int]]:
    """Each row's ids after the first `told`; its answer begins in slot `width`."""
    tokens, lengths = jax.device_get((state.tokens[:, width:], state.lengths))
    pairs = zip(tokens, lengths, strict=True)
    return [row[told:length].tolist() for row, length in pairs]


def finished(state: State, width: int, limit: int) -> Generation:
    tokens, lengths, log_probs = jax.device_get((state.tokens, state.lengths, state.log_probs))
    answer = slice(width, width + limit)
    return Generation(tokens[:, answer], lengths, log_probs[:, answer])
