"""Rolling caches and sinks against plain attention over exactly the tokens that are kept."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.decode.drafts import rollback
from research.decode.generate import generate
from research.decode.sampling import Sampling
from research.kernels.attend import reference
from research.kernels.mask import Mask
from research.models import decoder
from research.models.attention import Attention, Inputs
from research.models.families.llama import llama
from research.models.position import Alibi, Rope
from research.models.sinks import StreamingAttention, streaming

T, WINDOW = 15, 4
FIELDS = {"heads": 4, "kv_heads": 2, "head_size": 8, "window": WINDOW}
CONFIG = llama(50, 2, 32, 4, 2, 32, max_length=16, init_std=0.4)


def inputs(scheme, positions, mask=Mask()):
    return Inputs(scheme.tables(positions, 8), mask, scheme, reference, positions)


@pytest.fixture(scope="module")
def layer():
    x = jax.random.normal(jax.random.key(0), (2, T, 32))
    attention = Attention(**FIELDS)
    boxed = attention.init(jax.random.key(1), x, inputs(Rope(), jnp.arange(T)[None]))["params"]
    return x, jax.tree.map(lambda w: 8 * w, nn.meta.unbox(boxed))


def slow(layer, scheme, sinks):
    """Per query: plain attention over the kept tokens, standing at 0, 1, 2, ... (the paper)."""
    x, params = layer
    out = []
    for t in range(x.shape[1]):
        kept = sorted({*range(min(sinks, t + 1)), *range(max(0, t - WINDOW + 1), t + 1)})
        plain = Attention(**FIELDS | {"window": None})
        at = inputs(scheme, jnp.arange(len(kept))[None])
        out.append(plain.apply({"params": params}, x[:, jnp.array(kept)], at)[0][:, -1:])
    return jnp.concatenate(out, axis=1)


@partial(jax.jit, static_argnames="module")
def step(params, module, x, inputs, cache):
    return module.apply({"params": params}, x, inputs, cache)


def in_chunks(layer, scheme, sinks, sizes):
    x, params = layer
    module = StreamingAttention(**FIELDS, sinks=sinks)
    cache, out, start = module.empty_cache(2, None, jnp.float32), [], 0
    for size in sizes:
        at = inputs(scheme, jnp.arange(start, start + size)[None])
        y, cache = step(params, module, x[:, start : start + size], at, cache)
        out.append(y)
        start += size
    return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize(
    ("scheme", "sinks"), [(Rope(), 0), (Rope(), 2), (Rope(interleaved=True), 2), (Alibi(), 2)]
)
def test_equals_plain_attention_over_what_is_kept(layer, scheme, sinks):
    want = slow(layer, scheme, sinks)
    for sizes in ([1] * T, [11, 1, 1, 2]):
        np.testing.assert_allclose(in_chunks(layer, scheme, sinks, sizes), want, atol=1e-4)
    x, params = layer
    module = StreamingAttention(**FIELDS, sinks=sinks)
    whole, _ = step(params, module, x, inputs(scheme, jnp.arange(T)[None]), None)
    np.testing.assert_allclose(whole, want, atol=1e-4)
    if sinks:  # and the sinks matter
        assert np.abs(want - slow(layer, scheme, 0)).max() > 1e-2


def test_gradients_of_the_full_form_are_those_of_the_slow_form(layer):
    x, params = layer[0][:, :8], layer[1]
    module, at = StreamingAttention(**FIELDS, sinks=2), inputs(Rope(), jnp.arange(8)[None])

    def fast(params):
        return (module.apply({"params": params}, x, at)[0] ** 2).sum()

    def by_hand(params):
        return (slow((x, params), Rope(), 2) ** 2).sum()

    got, want = jax.jit(jax.grad(fast))(params), jax.jit(jax.grad(by_hand))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


@partial(jax.jit, static_argnames="model")
def apply(params, tokens, model, **more):
    return model.apply({"params": params}, tokens, **more)


@pytest.fixture(scope="module")
def trained():
    params = decoder.init(decoder.Decoder(CONFIG), jax.random.key(0))
    params = jax.tree.map(lambda w: w * 10 if w.ndim == 3 else w, params)
    return params, jax.random.randint(jax.random.key(1), (2, 48), 0, 50)


def with_window(window, **fields):
    block = CONFIG.stacks[0].pattern[0]
    near = block.clone(attention=block.attention.clone(window=window, **fields))
    return dataclasses.replace(CONFIG, stacks=(decoder.Stack(1, (near, block)),))


@pytest.mark.parametrize("config", [with_window(WINDOW), streaming(CONFIG, WINDOW, 0)])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_window_decodes_with_a_cache(trained, config, stacked):
    """Alternating local and global layers with the plain cache; rolling caches in all layers."""
    params, tokens = trained
    if len(config.stacks[0].pattern) == 2:
        params = decoder.init(decoder.Decoder(config), jax.random.key(2))
        same = config
    else:
        block = CONFIG.stacks[0].pattern[0]
        near = block.clone(attention=block.attention.clone(window=WINDOW))
        same = dataclasses.replace(CONFIG, stacks=(decoder.Stack(2, (near,)),))
    want = apply(params, tokens[:, :16], decoder.Decoder(same))
    model = decoder.Decoder(config)
    tree = params if stacked else decoder.unstack(params)
    cache = decoder.empty_cache(model, 2, 16, stacked=stacked)
    logits, cache = apply(tree, tokens[:, :9], model, cache=cache)
    parts = [logits]
    for t in range(9, 16):
        logits, cache = apply(tree, tokens[:, t : t + 1], model, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-4)


def test_without_an_end_beyond_the_trained_context(trained):
    """48 tokens through a model of 16, in a cache whose size never changes, equal to the full form."""
    params, tokens = trained
    model = decoder.Decoder(streaming(CONFIG, WINDOW, 2))
    cache = decoder.empty_cache(model, 2, None)

    def size(cache):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    # 2 layers, 2 rows, 6 slots of keys and values (2 heads of 8, float32), positions and segments;
    # then index and lengths.
    bound = 2 * 2 * 6 * (2 * 2 * 8 * 4 + 2 * 4) + 4 + 2 * 4
    assert size(cache) == bound
    parts = []
    for t in range(48):
        logits, cache = apply(params, tokens[:, t : t + 1], model, cache=cache)
        assert size(cache) == bound
        parts.append(logits)
    want = apply(params, tokens, model)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-4)
    with pytest.raises(ValueError, match="Attention keeps every token: its cache needs a length"):
        decoder.empty_cache(decoder.Decoder(CONFIG), 1, None)


def test_left_padding_and_packing(trained):
    params, tokens = trained
    model = decoder.Decoder(streaming(CONFIG, WINDOW, 2))
    alone = apply(params, tokens[:1, :12], model)[0]
    padded = jnp.concatenate([jnp.full((1, 5), 7), tokens[:1, :11]], axis=1)
    segments = jnp.array([[0] * 5 + [1] * 11])
    cache = decoder.empty_cache(model, 1, None)
    logits, cache = apply(params, padded, model, segment_ids=segments, cache=cache)
    more, _ = apply(params, tokens[:1, 11:12], model, cache=cache)
    np.testing.assert_allclose(jnp.concatenate([logits[0, 5:], more[0]]), alone, atol=1e-4)
    packed = jnp.concatenate([tokens[1, :9], tokens[0, :12]])[None]
    segments = jnp.array([[1] * 9 + [2] * 12])
    got = apply(params, packed, model, segment_ids=segments)
    np.testing.assert_allclose(got[0, 9:], alone, atol=1e-4)


def test_generation_uses_it(trained):
    params, tokens = trained
    config = streaming(dataclasses.replace(CONFIG, max_length=64), WINDOW, 2)
    model, sampling = decoder.Decoder(config), Sampling(0.0, max_tokens=6)
    prompts = [tokens[0, :13].tolist(), tokens[1, :5].tolist()]
    said = generate(model, params, prompts, jax.random.key(0), sampling).rows()
    for prompt, answer in zip(prompts, said, strict=True):
        logits = apply(params, jnp.array([prompt + answer]), model)[0]
        assert answer == jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist()


def test_what_it_cannot_do_is_an_error(layer, trained):
    x, params = layer
    at = jnp.arange(T)[None]

    def call(inputs, module=StreamingAttention(**FIELDS, sinks=1), memory=None):
        return module.apply({"params": params}, x, inputs, None, memory)

    with pytest.raises(ValueError, match="StreamingAttention has no prefix-LM or bidirectional"):
        call(inputs(Rope(), at, Mask(prefix=jnp.array([2, 2]))))
    with pytest.raises(ValueError, match="StreamingAttention has no memory to look at"):
        call(inputs(Rope(), at), memory=x)
    with pytest.raises(ValueError, match="StreamingAttention has no window"):
        call(inputs(Rope(), at), StreamingAttention(**FIELDS | {"window": None}, sinks=1))
    with pytest.raises(ValueError, match="counts positions as one number a token"):
        call(dataclasses.replace(inputs(Rope(), at), positions=jnp.zeros((1, T, 2))))
    with pytest.raises(ValueError, match="a window of 0 with 4 sinks"):
        streaming(CONFIG, 0)
    with pytest.raises(
        ValueError, match="streaming with window 9 does not replace Attention of window 4"
    ):
        streaming(with_window(4), 9)
    cache = decoder.empty_cache(decoder.Decoder(streaming(CONFIG, 4)), 1, 16)
    with pytest.raises(ValueError, match=r"a cache that forgets .* cannot go back"):
        rollback(cache, jnp.array(0))
