"""Decoding by an encoder–decoder: the source is read once, the target found by `beam`'s search.

One beam is greedy search. Vaswani et al. 2017 (section 6.1) use four, and divide a score by
((5 + length) / 6)^0.6 where `Beams` has length^length_penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.decode.beam import BeamResult, Beams, Rules, State, advance, result, rules_of, start
from research.decode.generate import for_decoding
from research.decode.prompts import bucket, check_prompts, readable
from research.models import seq2seq
from research.types import Array, Params


@dataclass(frozen=True)
class Continuation:
    """An encoder–decoder that has read its source, in the form of a Decoder."""

    model: seq2seq.Seq2Seq

    def apply(self, variables: Any, tokens: Array, **more: Any) -> Any:
        return self.model.apply(variables, None, tokens, **more)


def translate(
    model: seq2seq.Seq2Seq,
    params: Params,
    sources: Sequence[Sequence[int]],
    bos_id: int,
    search: Beams = Beams(),
    pad_id: int = 0,
) -> BeamResult:
    """The `n_best` targets of each source (ids, its end included) that a search finds.

    What is found for a source does not depend on the sources beside it. PromptError says which
    source is empty, outside the vocabulary, or longer than max_length.
    """
    config = model.config
    check_prompts(sources, readable(params), config.max_length, 0)
    check_prompts([[bos_id]], config.vocab_size, config.max_length, search.max_tokens)
    search.check(config.vocab_size)
    tokens, segments = right_padded(sources, bucket(max(map(len, sources))), pad_id)
    rules, slots = rules_of(search, pad_id), bucket(1 + search.max_tokens, least=64, steps=2)
    params = {**params, "decoder": for_decoding(params["decoder"])}
    state = read(model, params, tokens, segments, bos_id, rules, slots)
    return result(advance(Continuation(model), params, state, rules), search, 1)


@partial(jax.jit, static_argnames=("model", "slots"))
def read(
    model: seq2seq.Seq2Seq,
    params: Params,
    source: Array,
    segments: Array,
    bos_id: int,
    rules: Rules,
    slots: int,
) -> State:
    """Read the sources [B, S] and take the first step of the search."""
    B, S = source.shape
    tokens = jnp.full((B, 1), bos_id, jnp.int32)
    cache = seq2seq.empty_cache(model, B, slots, S, stacked=False)
    logits, cache = model.apply(
        {"params": params}, source, tokens, source_segment_ids=segments, cache=cache
    )
    return start(logits[:, 0], cache, tokens, rules)


def right_padded(
    rows: Sequence[Sequence[int]], width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [B, width] int32; padding, on the right, has segment id 0."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    segments = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        segments[number, : len(row)] = 1
    return tokens, segments
