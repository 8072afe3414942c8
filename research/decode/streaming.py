"""Generation without an end: for models whose caches keep a bounded part of the past.

With the first tokens and a rolling window kept (`models.sinks`, StreamingLLM: Xiao et al. 2023,
arXiv:2309.17453) or a sum over the past (`models.linear_attention`), memory does not grow with what
is said, and nothing ends at the model's `max_length`.

    for new in stream(model, params, prompts, jax.random.key(0), Sampling(stop_ids=(2,))):
        ...  # the new ids of every row

As far as `generate` goes the tokens are its tokens: a row draws with the same keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from research.decode.generate import for_decoding, in_layers, prefill, row_keys
from research.decode.prompts import bucket, check_prompts, left_padded, readable
from research.decode.sampling import Filters, Sampling, choose
from research.models.attention import Cache
from research.models.decoder import Decoder, DecoderConfig
from research.types import Array, Params


@struct.dataclass
class Stream:
    """Between two tokens: of one size however many there have been."""

    cache: Cache
    logits: Array  # [B, V], of the next token
    ended: Array  # [B] bool
    keys: Array  # [B]
    step: Array  # number of tokens drawn


def stream(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    rng: Array,
    sampling: Sampling = Sampling(),
    every: int = 16,
) -> Iterator[list[list[int]]]:
    """The new ids of every row, `every` tokens at a time, [] for a row that has ended.

    It goes on until all rows have met one of `sampling.stop_ids`, or until it is no longer asked;
    `sampling.max_tokens` is not looked at. Prompts must fit the model's max_length; `rng` and
    `params` as for `generate`. Errors come at the call: ValueError for a model whose cache grows or
    whose positions end, and for the filters that look at the whole past; PromptError as `generate`.
    """
    require_endless(model.config, sampling)
    sampling.check_ids(model.config.vocab_size)
    context, missing = model.config.max_length, model.config.position.missing
    check_prompts(prompts, readable(params), context, 0, missing, model.before)
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    return _stream(model, params, prompts, row_keys(rng, len(prompts)), sampling, every)


def require_endless(config: DecoderConfig, sampling: Sampling) -> None:
    """ValueError naming the layer whose cache grows, or what else needs an end."""
    first = 0
    for stack in config.stacks:
        for number, block in enumerate(stack.pattern):
            try:
                jax.eval_shape(partial(block.attention.empty_cache, 1, None, config.dtype))
            except ValueError as error:
                raise ValueError(f"layer {first + number} of this model: {error}") from error
        first += stack.count * len(stack.pattern)
    if config.position.most is not None:
        raise ValueError(f"{config.position} ends after {config.position.most} positions")
    for name in ("repetition_penalty", "no_repeat_ngram"):
        if getattr(sampling, name) is not None:
            raise ValueError(f"sampling: {name} looks at the whole past, which is not kept")


def _stream(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    keys: Array,
    sampling: Sampling,
    every: int,
) -> Iterator[list[list[int]]]:
    tokens, segments = left_padded(prompts, bucket(max(map(len, prompts))), 0)
    params = params if in_layers(params) else for_decoding(params)
    stop = jnp.asarray(sampling.stop_ids, jnp.int32)
    state = begin(model, params, tokens, segments, keys)
    while not bool(state.ended.all()):
        state, drawn, running = advance(model, params, state, sampling.filters, stop, every)
        drawn, running = np.asarray(drawn), np.asarray(running)
        yield [row[said].tolist() for row, said in zip(drawn.T, running.T, strict=True)]


@partial(jax.jit, static_argnames="model")
def begin(model: Decoder, params: Params, tokens: Array, segments: Array, keys: Array) -> Stream:
    """The prompts [B, P] read, left padding with segment 0."""
    logits, cache = prefill(model, params, tokens, segments, None)
    ended = jnp.zeros(len(tokens), bool)
    return Stream(cache, logits.astype(jnp.float32), ended, keys, jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames=("model", "count"), donate_argnames="state")
def advance(
    model: Decoder, params: Params, state: Stream, filters: Filters, stop: Array, count: int
) -> tuple[Stream, Array, Array]:
    """`count` tokens further: (state, tokens [count, B], whether the row had not ended before each)."""

    def step(state: Stream, _: None) -> tuple[Stream, tuple[Array, Array]]:
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
        said = jnp.broadcast_to(state.step, state.ended.shape)
        token = choose(state.logits, filters, keys, said=said)
        logits, cache = model.apply({"params": params}, token[:, None], cache=state.cache)
        new = state.replace(
            cache=cache,
            logits=logits[:, 0],
            ended=state.ended | (token[:, None] == stop).any(-1),
            step=state.step + 1,
        )
        return new, (token, ~state.ended)

    state, (tokens, running) = lax.scan(step, state, length=count)
    return state, tokens, running
