"""Linear attention: the chunked, the recurrent and the quadratic form are one function."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.mask import Mask
from research.models import decoder
from research.models.attention import Inputs
from research.models.families.llama import llama
from research.models.linear_attention import (
    LinearAttention,
    LinearState,
    elu_plus_one,
    linear_attention,
)
from research.models.position import Alibi, Rope

B, T, N, K, H = 2, 13, 4, 2, 6


def empty(rows=B):
    return LinearAttention(N, K, H).empty_cache(rows)


@pytest.fixture(scope="module")
def parts():
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    return elu_plus_one(q), elu_plus_one(k), v


def quadratic(q, k, v, segments, rotate=lambda x: x):
    """The definition, row by row and head by head, with a T×T matrix."""
    turned_q, turned_k = rotate(q), rotate(k)
    visible = np.tril(np.ones((T, T), bool))
    out = np.zeros(q.shape)
    for b in range(B):
        same = (segments[b][:, None] == segments[b][None, :]) & (segments[b][None, :] != 0)
        for n in range(N):
            group = n // (N // K)
            over = np.where(visible & same, turned_q[b, :, n] @ turned_k[b, :, group].T, 0)
            under = np.where(visible & same, q[b, :, n] @ k[b, :, group].T, 0).sum(1)
            real = segments[b] != 0
            out[b, real, n] = (over @ v[b, :, group])[real] / under[real, None]
    return out


SEGMENTS = {
    "one": [[1] * T] * B,
    "packed": [[1] * 5 + [2] * 7 + [0], [3] * 2 + [1] * 9 + [0] * 2],
    "left padding": [[0] * 4 + [1] * 9, [1] * 13],
    "a gap": [[1, 1, 0, 0, 0, 0, 1, 1, 1, 2, 0, 0, 2], [0] * 13],
}


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("turn", [False, True])
def test_chunks_steps_and_the_definition_agree(parts, name, chunk, turn):
    segments = jnp.array(SEGMENTS[name])
    tables = Rope().tables(jnp.arange(T)[None], H)

    def rotate(x, at=slice(None)):
        return Rope().rotate(x, tuple(t[:, at] for t in tables)) if turn else x

    want = quadratic(*parts, np.array(segments), rotate)
    got, end = linear_attention(*parts, segments, empty(), rotate, chunk)
    np.testing.assert_allclose(got, want, atol=1e-4)
    state, steps = empty(), []
    for t in range(T):
        at = slice(t, t + 1)
        now = [each[:, at] for each in (*parts, segments)]
        y, state = linear_attention(*now, state, partial(rotate, at=at), chunk)
        steps.append(y)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), want, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), end, state)


def test_gradients_agree(parts):
    segments = jnp.array(SEGMENTS["packed"])

    def total(q, k, v, chunk):
        return (linear_attention(q, k, v, segments, empty(), chunk=chunk)[0] ** 2).sum()

    def definition(q, k, v):
        same = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
        visible = (same & jnp.tril(jnp.ones((T, T), bool)))[:, None]
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.where(visible, jnp.einsum("btnh,bsnh->bnts", q, k), 0)
        under = scores.sum(-1, keepdims=True)
        y = jnp.einsum("bnts,bsnh->btnh", scores / jnp.where(under == 0, 1, under), v)
        return (jnp.where((segments != 0)[:, :, None, None], y, 0) ** 2).sum()

    want = jax.grad(definition, (0, 1, 2))(*parts)
    for chunk in (3, 64):
        got = jax.grad(total, (0, 1, 2))(*parts, chunk)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_two_tokens_by_hand():
    """φ(k) = 1, 3 and φ(q) = 2: y = v_1, then (2·1·v_1 + 2·3·v_2) / (2·1 + 2·3)."""
    one = lambda *values: jnp.array(values, jnp.float32).reshape(1, -1, 1, 1)  # noqa: E731
    state = LinearState(jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1)), jnp.zeros(1, jnp.int32))
    y, state = linear_attention(one(2, 2), one(1, 3), one(10, 20), jnp.ones((1, 2), int), state)
    np.testing.assert_allclose(y.ravel(), [10, 140 / 8])
    assert state.products.item() == 70 and state.keys.item() == 4
    np.testing.assert_allclose(elu_plus_one(jnp.array([-1.0, 0, 2])), [np.exp(-1), 1, 3], rtol=1e-6)


def test_a_decoder_of_it_decodes_with_a_state_of_constant_size():
    base = llama(50, 2, 24, 4, 2, 32, head_size=6, max_length=16, init_std=0.4)
    block = base.stacks[0].pattern[0].clone(attention=LinearAttention(N, K, H, chunk=4))
    config = dataclasses.replace(base, stacks=(decoder.Stack(2, (block,)),))
    model = decoder.Decoder(config)
    plain = decoder.init(decoder.Decoder(base), jax.random.key(0))
    params = jax.tree.map(lambda w: w * 10 if w.ndim == 3 else w, plain)
    tokens = jax.random.randint(jax.random.key(1), (2, 30), 0, 50)
    want = model.apply({"params": params}, tokens)
    cache = decoder.empty_cache(model, 2, None)
    size = 2 * 2 * (K * H * H + K * H + 1) * 4 + 4 + 2 * 4
    step = jax.jit(
        lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache)
    )
    logits, cache = step(params, tokens[:, :7], cache)
    parts = [logits]
    for t in range(7, 30):
        logits, cache = step(params, tokens[:, t : t + 1], cache)
        parts.append(logits)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == size
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=2e-4)
    assert decoder.axes(model) == decoder.axes(decoder.Decoder(base))


@pytest.mark.parametrize(
    ("mask", "scheme", "named"),
    [
        (Mask(window=4), Rope(), "window"),
        (Mask(prefix=jnp.array([1])), Rope(), "prefix"),
        (Mask(causal=False), Rope(), "bidirectional mask"),
        (Mask(), Alibi(), "ALiBi slopes"),
    ],
)
def test_what_a_sum_cannot_do_is_an_error(mask, scheme, named):
    x, at = jnp.zeros((1, 3, 24)), jnp.arange(3)[None]
    inputs = Inputs(scheme.tables(at, H), mask, scheme, reference)
    with pytest.raises(ValueError, match=f"sums over the whole past: it can have no {named}"):
        LinearAttention(N, K, H).init(jax.random.key(0), x, inputs)
