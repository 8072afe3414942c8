"""Positions added to the embeddings: by hand, padded, packed, cached, and past their end."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode import Sampling, generate
from research.models import decoder
from research.models.additive import Learned, Sinusoidal, sinusoids
from research.models.families.gpt import gpt
from research.models.families.llama import llama
from research.models.position import NoPosition

init = jax.jit(decoder.init, static_argnums=0)

CONFIG = gpt(50, 3, 24, 3, 16, init_std=0.4)
MODEL = decoder.Decoder(CONFIG)


@pytest.fixture(scope="module")
def params():
    return init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 11), 0, 50)


@partial(jax.jit, static_argnames=("model", "method"))
def apply(params, tokens, model=MODEL, **more):
    return model.apply({"params": params}, tokens, **more)


def test_sinusoids_are_those_of_the_paper():
    """Section 3.5 entry by entry, and the row of position 1 of width 4 by hand."""
    for width in (6, 7):
        want = [
            [
                (math.cos if i % 2 else math.sin)(t / 10_000 ** (i // 2 * 2 / width))
                for i in range(width)
            ]
            for t in range(40)
        ]
        got = sinusoids(jnp.arange(40), width)
        np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(
        sinusoids(jnp.array([[1]]), 4)[0, 0], [0.841471, 0.540302, 0.0099998, 0.99995], atol=1e-6
    )


def test_a_table_is_a_parameter_of_its_own(params):
    assert params["position"]["table"].shape == (16, 24)
    assert np.std(params["position"]["table"]) == pytest.approx(0.4, rel=0.1)
    assert decoder.axes(MODEL)["position"] == {"table": (None, "embed")}
    small = dataclasses.replace(CONFIG, position=Learned(16, init_std=0.01))
    table = init(decoder.Decoder(small), jax.random.key(0))["position"]["table"]
    assert np.std(table) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("scheme", [Sinusoidal(), Learned(16)])
def test_what_is_added_is_added_to_the_embeddings(params, tokens, scheme):
    """Equal to a model without positions whose table of embeddings has them in it already."""
    model = decoder.Decoder(dataclasses.replace(CONFIG, position=scheme))
    added = (
        params["position"]["table"]
        if isinstance(scheme, Learned)
        else sinusoids(jnp.arange(16), 24)
    )
    row = tokens[0, :5]
    blind = decoder.Decoder(dataclasses.replace(CONFIG, position=NoPosition(), vocab_size=5))
    inside = {**params, "embed": {"table": params["embed"]["table"][row] + added[:5]}}
    del inside["position"]
    want = apply(inside, jnp.arange(5)[None], blind, method="hidden")
    np.testing.assert_allclose(apply(params, row[None], model, method="hidden"), want, atol=1e-5)


@pytest.mark.parametrize(
    "model", [MODEL, decoder.Decoder(dataclasses.replace(CONFIG, position=Sinusoidal()))]
)
def test_cached_decoding_with_left_padding_equals_the_whole(params, tokens, model):
    segments = jnp.ones_like(tokens).at[0, :3].set(0)
    cache = decoder.empty_cache(model, 2, 20)
    logits, cache = apply(params, tokens[:, :6], model, segment_ids=segments[:, :6], cache=cache)
    parts = [logits]
    for t in range(6, 11):
        logits, cache = apply(params, tokens[:, t : t + 1], model, cache=cache)
        parts.append(logits)
    got = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(got[0, 3:], apply(params, tokens[:1, 3:], model)[0], atol=2e-5)
    np.testing.assert_allclose(got[1], apply(params, tokens[1:], model)[0], atol=2e-5)


def test_batched_generation_equals_one_by_one(params):
    prompts = [[7, 3, 9, 1, 4], [8], [2, 2, 5]]
    sampling = Sampling(temperature=0, max_tokens=6)
    rows = generate(MODEL, params, prompts, jax.random.key(0), sampling).rows()
    for prompt, row in zip(prompts, rows, strict=True):
        alone = prompt
        for _ in range(6):
            alone = [*alone, int(apply(params, jnp.array([alone]))[0, -1].argmax())]
        assert row == alone[len(prompt) :]


def test_packed_equals_separate_in_a_row_longer_than_the_table(params, tokens):
    """Two texts and eight of padding in a row of 26; there are 16 positions."""
    packed = jnp.concatenate([tokens[0], tokens[1, :7], jnp.zeros(8, jnp.int32)])[None]
    segments = jnp.array([[1] * 11 + [2] * 7 + [0] * 8])
    logits = MODEL.apply({"params": params}, packed, segment_ids=segments)[0]
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:11], apply(params, tokens[:1])[0], atol=2e-5)
    np.testing.assert_allclose(logits[11:18], apply(params, tokens[1:, :7])[0], atol=2e-5)
    longer = jnp.concatenate([packed, jnp.zeros((1, 30), jnp.int32)], axis=1)
    ids = jnp.pad(segments, ((0, 0), (0, 30)))
    np.testing.assert_allclose(
        apply(params, longer, segment_ids=ids)[0, :18], logits[:18], atol=2e-5
    )


def test_past_the_end_is_an_error_or_nan(params):
    """Where positions are known it says so, with jit too when they follow from the length."""
    message = "a token stands at position 16; there are positions 0..15"
    long = jnp.zeros((1, 17), jnp.int32)
    for run in (apply, partial(MODEL.apply, {"params": params})):
        with pytest.raises(ValueError, match=message):
            run(params, long) if run is apply else run(long)
    with pytest.raises(ValueError, match="position 99"):
        MODEL.apply({"params": params}, long[:, :1], positions=jnp.array([[99]]))
    cache = decoder.empty_cache(MODEL, 1, 32)
    _, cache = apply(params, long[:, :16], cache=cache)
    with pytest.raises(ValueError, match=message):
        MODEL.apply({"params": params}, long[:, :1], cache=cache)
    assert np.isnan(apply(params, long[:, :1], cache=cache)[0]).all()


def test_a_context_longer_than_the_table_is_refused():
    with pytest.raises(ValueError, match=r"max_length 64 is more than Learned\(max_length=32"):
        llama(50, 2, 24, 3, 1, 32, position=Learned(32), max_length=64)


def test_positions_may_be_exchanged_like_any_part(tokens):
    """A LLaMA with learned positions runs, and gives its table a gradient."""
    model = decoder.Decoder(llama(50, 2, 24, 3, 1, 32, position=Learned(16), max_length=16))
    params = init(model, jax.random.key(0))
    gradient = jax.grad(lambda p: (apply(p, tokens, model) ** 2).mean())(params)
    rows = np.abs(gradient["position"]["table"]).max(axis=1)
    assert (rows[:11] > 0).all() and not rows[11:].any()
