"""Streaming without an end against `generate` where both fit, and against one pass over the whole."""

import dataclasses
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode import PromptError, Sampling, generate, stream
from research.decode import streaming as parts
from research.decode.generate import for_decoding
from research.models import decoder
from research.models.additive import Learned
from research.models.families.llama import llama
from research.models.linear_attention import LinearAttention
from research.models.sinks import streaming

BASE = llama(50, 2, 24, 4, 2, 32, head_size=6, max_length=16, init_std=0.4)
LINEAR = BASE.stacks[0].pattern[0].clone(attention=LinearAttention(4, 2, 6, chunk=4))
CONFIGS = {
    "sinks": streaming(BASE, window=5, sinks=2),
    "linear": dataclasses.replace(BASE, stacks=(decoder.Stack(2, (LINEAR,)),)),
}
PROMPTS = [[7, 8, 9], [3, 1, 4, 1, 5, 9]]
RNG = jax.random.key(3)


def made(name):
    model = decoder.Decoder(CONFIGS[name])
    params = decoder.init(model, jax.random.key(0))
    return model, jax.tree.map(lambda w: w * 10 if w.ndim == 3 else w, params)


def joined(chunks):
    """Chunks of rows -> rows."""
    return [[token for part in row for token in part] for row in zip(*chunks, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_says_what_generate_says(name):
    model, params = made(name)
    sampling = Sampling(temperature=1.0, top_k=20, max_tokens=10, forced_ids=(4,))
    want = generate(model, params, PROMPTS, RNG, sampling).rows()
    got = list(islice(stream(model, params, PROMPTS, RNG, sampling, every=5), 2))
    assert [[len(row) for row in chunk] for chunk in got] == [[5, 5], [5, 5]]
    assert joined(got) == want and want[0] != want[1]
    stopping = dataclasses.replace(sampling, stop_ids=(want[0][3], want[1][6]))
    ended = list(stream(model, params, PROMPTS, RNG, stopping, every=5))
    assert joined(ended) == generate(model, params, PROMPTS, RNG, stopping).rows()
    assert len(ended) <= 2  # it ends by itself


@pytest.mark.parametrize("name", CONFIGS)
def test_beyond_max_length_it_is_still_the_function_without_a_cache(name):
    model, params = made(name)
    prompt = PROMPTS[1]
    greedy = Sampling(temperature=0.0)
    said = joined(islice(stream(model, params, [prompt], RNG, greedy, every=12), 4))[0]
    assert len(said) == 3 * model.config.max_length
    logits = model.apply({"params": params}, jnp.array([prompt + said]))[0, len(prompt) - 1 : -1]
    best = logits.max(-1)
    chosen = logits[np.arange(len(said)), np.array(said)]
    np.testing.assert_allclose(chosen, best, atol=1e-3)
    assert len(set(said)) > 5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_does_not_grow_and_logits_stay_finite(name):
    model, params = made(name)
    params = for_decoding(params)
    tokens, segments = jnp.array([PROMPTS[0]]), jnp.ones((1, 3), jnp.int32)
    state = parts.begin(model, params, tokens, segments, RNG[None])
    shapes = jax.tree.map(jnp.shape, state)
    filters, stop = Sampling().filters, jnp.zeros(0, jnp.int32)
    for _ in range(4):
        state, _, _ = parts.advance(model, params, state, filters, stop, 12)
        assert jax.tree.map(jnp.shape, state) == shapes
        assert np.isfinite(state.logits).all()
    assert int(state.cache.lengths[0]) == 3 + 48 > 3 * model.config.max_length


def test_what_must_end_is_refused_before_anything_is_read():
    params = {"embed": {"table": jnp.zeros((BASE.vocab_size, 1))}}  # nothing else is looked at
    block = BASE.stacks[0].pattern[0]
    mixed = dataclasses.replace(BASE, stacks=(decoder.Stack(1, (LINEAR, LINEAR, block)),))
    learned = dataclasses.replace(CONFIGS["sinks"], position=Learned(16))
    sinks = CONFIGS["sinks"]
    for config, sampling, message in [
        (BASE, Sampling(), "layer 0 of this model: Attention keeps every token"),
        (mixed, Sampling(), "layer 2 of this model: Attention keeps every token"),
        (learned, Sampling(), "ends after 16 positions"),
        (sinks, Sampling(repetition_penalty=1.2), "repetition_penalty looks at the whole past"),
        (sinks, Sampling(no_repeat_ngram=2), "no_repeat_ngram looks at the whole past"),
        (sinks, Sampling(banned_ids=(50,)), "banned_ids holds 50"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(decoder.Decoder(config), params, PROMPTS, RNG, sampling)
    with pytest.raises(PromptError, match="prompt 0 has 17 tokens"):
        stream(decoder.Decoder(sinks), params, [[1] * 17], RNG)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        stream(decoder.Decoder(sinks), params, PROMPTS, RNG, every=0)
    with pytest.raises(ValueError, match="expected one key or 2 keys"):
        stream(decoder.Decoder(sinks), params, PROMPTS, jax.random.split(RNG, 3))
