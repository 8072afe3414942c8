"""Caches in few bits against numpy's own rounding and attention, and against the plain cache."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.adapters import bottleneck, prefix
from research.decode import Sampling, generate, speculate
from research.decode.beam import reorder
from research.decode.speculative import Lookup
from research.kernels.attend import reference
from research.kernels.mask import Mask
from research.models import decoder, storage
from research.models.attention import Attention, Inputs
from research.models.families.llama import llama
from research.models.linear_attention import LinearAttention
from research.models.position import NoPosition
from research.models.sinks import streaming
from research.models.storage import Storage, stored
from research.weights import quantized
from research.weights.formats import Codebook, Float8, Integer

B, T, D, N, K, H = 2, 6, 8, 4, 2, 8
INT8, INT4 = Integer(8, "row"), Integer(4, "row")
BOTH8 = Storage(INT8, INT8)
CONFIG = llama(50, 2, 32, 4, 2, 48, head_size=8, max_length=64, init_std=0.4)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


@pytest.fixture(scope="module")
def layer():
    """Inputs and matrices of a few bits: keys and values are exact in any order of addition."""
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 9, (B, T, D)) / 4
    names = {"q": N * H, "k": K * H, "v": K * H}
    params = {name: {"kernel": rng.integers(-8, 9, (D, n)) / 8} for name, n in names.items()}
    params["o"] = {"kernel": np.eye(N * H, D)}
    return jax.tree.map(np.float32, (x, params))


@partial(jax.jit, static_argnames="module")
def step(module, params, x, cache, index):
    at = index + jnp.arange(x.shape[1])[None]
    mask = Mask(offset=index)
    inputs = Inputs(NoPosition().tables(at, H), mask, NoPosition(), reference, at)
    return module.apply({"params": params}, x, inputs, cache)


def in_chunks(layer, kept, sizes, slots=T + 3):
    x, params = layer
    module = Attention(N, K, H, storage=kept)
    cache, out, index = module.empty_cache(B, slots, jnp.float32), [], 0
    for size in sizes:
        y, cache = step(module, params, x[:, index : index + size], cache, jnp.int32(index))
        out.append(y)
        index += size
    return np.concatenate(out, axis=1), cache


def rounded(x, format, scale_dtype):
    """[..., H] through the nearest codes, as the paper's formulas have them."""
    if format is None:
        return x
    group = x.shape[-1] if format.group == "row" else format.group
    cut = x.reshape(*x.shape[:-1], -1, group)
    if format.zero_point == "middle":
        most = 2 ** (format.bits - 1) - 1
        s = (np.abs(cut).max(-1, keepdims=True) / np.float32(most)).astype(scale_dtype)
        out = np.clip(np.rint(cut / s.astype(np.float32)), -most, most) * s.astype(np.float32)
        return out.reshape(x.shape)
    low, high = cut.min(-1, keepdims=True), cut.max(-1, keepdims=True)
    s = ((high - low) / np.float32(2**format.bits - 1)).astype(scale_dtype).astype(np.float32)
    low = low.astype(scale_dtype).astype(np.float32)
    codes = np.clip(np.rint((cut - low) / s), 0, 2**format.bits - 1)
    return (codes * s + low).reshape(x.shape)


def slow(layer, kept):
    """Causal attention over rounded keys and values, head by head."""
    x, params = layer
    q, k, v = ((x @ params[name]["kernel"]).reshape(B, T, -1, H) for name in "qkv")
    k, v = (
        rounded(a, f, kept.scale_dtype)
        for a, f in zip((k, v), (kept.keys, kept.values), strict=True)
    )
    out = np.zeros((B, T, N, H))
    for n in range(N):
        scores = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // 2]) / np.sqrt(H)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        w = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, n] = (w / w.sum(-1, keepdims=True)) @ v[:, :, n // 2]
    return out.reshape(B, T, -1)[..., :D]


KINDS = {
    "plain": Storage(),
    "int8": BOTH8,
    "int4 with float32 scales": Storage(INT4, INT4, np.float32),
    "int4 asymmetric in groups": Storage(*[Integer(4, 4, "minimum")] * 2),
    "keys alone": Storage(keys=INT4),
    "values alone": Storage(values=Integer(8, "row", "minimum")),
}


@pytest.mark.parametrize("kept", KINDS.values(), ids=KINDS)
def test_attention_reads_the_rounded_keys_and_values(layer, kept):
    y, _ = in_chunks(layer, kept, [T])
    np.testing.assert_allclose(y, slow(layer, kept), atol=1e-5)


def test_rounding_is_seen(layer):
    """What the test above compares differs by more than its tolerance."""
    plain = slow(layer, Storage())
    errors = [np.abs(slow(layer, kept) - plain).max() for kept in list(KINDS.values())[1:]]
    assert min(errors) > 1e-3


@pytest.mark.parametrize("kept", [BOTH8, KINDS["int4 asymmetric in groups"]], ids=["int8", "int4"])
def test_chunks_do_not_matter_and_other_slots_stay(layer, kept):
    y, cache = in_chunks(layer, kept, [T])
    parts, same = in_chunks(layer, kept, [3, 1, 1, 1])
    np.testing.assert_allclose(parts, y, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same, cache)
    for leaf in jax.tree.leaves(cache):
        assert leaf.shape[:2] == (B, T + 3) and not np.any(leaf[:, T:]) and np.any(leaf[:, :T])
    again = storage.put(cache.keys, jnp.ones((B, 1, K, H)), 2)  # rolled back, written anew
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(cache.keys), strict=True):
        np.testing.assert_array_equal(np.delete(new, 2, 1), np.delete(old, 2, 1))


@pytest.mark.parametrize(
    "format", [Codebook("NF4", 4), Float8("e4m3", "row"), Integer(2, "matrix")]
)
def test_any_format_of_a_matrix_will_do(format):
    x = jax.random.normal(jax.random.key(0), (2, 5, K, H))
    kept = storage.put(storage.empty((2, 7, K, H), None, format, jnp.float32), x, 1)
    expected = quantized.encode(x, format, False).values()
    np.testing.assert_array_equal(storage.get(kept, jnp.float32)[:, 1:6], expected)


def test_bytes_of_a_cache():
    """Head size 64: a token and head has 256 bytes in float32, 64 codes and one or two numbers here."""
    config = llama(50, 3, 32, 4, 2, 48, head_size=64, max_length=64)

    def size(kept):
        model = decoder.Decoder(stored(config, kept))
        return sum(
            leaf.nbytes for leaf in jax.tree.leaves(decoder.empty_cache(model, 2, 16).layers)
        )

    pairs = 2 * 3 * 2 * 16 * 2
    assert size(Storage()) == pairs * 256
    assert size(BOTH8) == pairs * (64 + 2)
    assert size(Storage(INT8, INT8, jnp.float32)) == pairs * (64 + 4)
    assert size(Storage(*[Integer(4, 32, "minimum")] * 2)) == pairs * (32 + 2 * (2 + 2))
    assert size(Storage(keys=INT4)) == pairs // 2 * (32 + 2 + 256)


@pytest.fixture(scope="module")
def params():
    small = jax.jit(decoder.init, static_argnums=0)(decoder.Decoder(CONFIG), jax.random.key(0))
    return jax.tree.map(lambda w: 4 * w, small)


def model_of(kept):
    return decoder.Decoder(stored(CONFIG, kept))


@partial(jax.jit, static_argnames="model")
def through_cache(model, params, tokens):
    cache = decoder.empty_cache(model, *tokens.shape)
    return model.apply({"params": params}, tokens, cache=cache)[0]


def test_logits_are_near_and_nearer_with_more_bits(params):
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 50)
    plain = through_cache(model_of(Storage()), params, tokens)
    errors = [
        float(jnp.sqrt(jnp.square(through_cache(model_of(kept), params, tokens) - plain).mean()))
        / float(plain.std())
        for kept in (BOTH8, Storage(INT4, INT4))
    ]
    assert 0 < errors[0] < 0.02 and 4 * errors[0] < errors[1] < 0.3


def test_decoding_says_the_same(params):
    """Ragged prompts padded on the left, beside each other and alone; drafts that are taken back."""
    greedy, rng = Sampling(temperature=0.0, max_tokens=8), jax.random.key(0)
    plain, few = model_of(Storage()), model_of(BOTH8)
    said = generate(few, params, PROMPTS, rng, greedy).rows()
    assert said == generate(plain, params, PROMPTS, rng, greedy).rows()
    alone = speculate(few, params, PROMPTS[2], rng, greedy, Lookup(2), None)
    assert alone.generation.rows() == said[2:]


def test_beams_gather_codes_with_their_scales():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, K, H)), jnp.float32)
    kept = storage.put(storage.empty((2, 4, K, H), None, INT4, jnp.float16), x, 0)
    gathered = storage.get(reorder(kept, jnp.array([1, 1, 0])), jnp.float32)
    np.testing.assert_array_equal(gathered, storage.get(kept, jnp.float32)[np.array([1, 1, 0])])


@pytest.mark.parametrize("stacked", [True, False])
def test_a_step_holds_one_layer_in_full(stacked):
    """Not all of them: the temporaries of a compiled step stay below two layers' floats of twelve."""
    config = llama(50, 12, 16, 2, 2, 16, head_size=64, max_length=512)
    model = decoder.Decoder(stored(config, BOTH8))
    params = jax.eval_shape(partial(decoder.init, model), jax.random.key(0))
    if not stacked:
        params = jax.eval_shape(decoder.unstack, params)
    cache = jax.eval_shape(partial(decoder.empty_cache, model, 4, 512, stacked=stacked))

    def one(params, token, cache):
        return model.apply({"params": params}, token, cache=cache)

    token = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    compiled = jax.jit(one, donate_argnums=2).lower(params, token, cache).compile()
    layer_in_full = 2 * 4 * 512 * 2 * 64 * 4
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < 2 * layer_in_full


def test_what_cannot_is_refused_by_name(params):
    config = stored(CONFIG, BOTH8)
    model = decoder.Decoder(config)
    with pytest.raises(ValueError, match="StreamingAttention keeps keys and values as they are"):
        decoder.empty_cache(decoder.Decoder(streaming(config, 4)), 1, None)
    with pytest.raises(ValueError, match="a prefix before stack_0/block_0 keeps keys"):
        prefix.add(model, params, jax.random.key(0), 4)
    adapted, _ = bottleneck.houlsby(decoder.Decoder(CONFIG), params, jax.random.key(0), 4)
    with pytest.raises(ValueError, match="a Serial has no storage"):
        stored(adapted.config, BOTH8)
    (stack,) = CONFIG.stacks
    linear = stack.pattern[0].clone(attention=LinearAttention(4, 2, 8))
    stacks = (dataclasses.replace(stack, pattern=(linear,)),)
    with pytest.raises(ValueError, match="a LinearAttention has no storage"):
        stored(dataclasses.replace(CONFIG, stacks=stacks), BOTH8)
    x = jnp.zeros((1, 2, 16))
    at = Inputs(None, Mask(causal=False), NoPosition(), reference)
    with pytest.raises(ValueError, match="cross-attention keeps keys and values as they are"):
        Attention(2, 2, 8, storage=BOTH8).init(jax.random.key(0), x, at, memory=x)


def test_bad_storage():
    with pytest.raises(ValueError, match="keys would have double quantized ones"):
        Storage(keys=Codebook(double=True))
    wrong = [(Integer(8, 5), 8, "groups of 5 do not fill 8 columns"), (INT4, 7, "not divide 7")]
    for format, size, message in wrong:
        attention = Attention(2, 2, size, storage=Storage(values=format))
        with pytest.raises(ValueError, match=message):
            attention.empty_cache(1, 2, jnp.float32)


def test_bfloat16_models_read_bfloat16():
    cache = Attention(N, K, H, storage=BOTH8).empty_cache(1, 2, jnp.bfloat16)
    assert storage.get(cache.keys, jnp.bfloat16).dtype == jnp.bfloat16
    nan = storage.put(cache.keys, jnp.full((1, 1, K, H), jnp.nan), 1)
    assert jnp.isnan(storage.get(nan, jnp.float32)[:, 1]).all()
