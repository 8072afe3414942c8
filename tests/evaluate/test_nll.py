"""Held-out likelihood against one full forward pass a sequence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evaluate.nll import (
    Likelihood,
    continuation_log_probs,
    held_out,
    of_sequences,
    windows,
)
from research.models import decoder
from research.models.attention import Attention
from research.models.layers import GatedMlp

V = 50
SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [7, 7], [20] * 19, [5], [30, 31, 32]]


@pytest.fixture(scope="module")
def model():
    block = decoder.Block(Attention(heads=2, kv_heads=2, head_size=8), GatedMlp(24))
    return decoder.Decoder(decoder.DecoderConfig(V, 16, (decoder.Stack(1, (block,)),), 24))


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(
        lambda x: 5 * x, jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(2))
    )


@pytest.fixture(scope="module")
def exact(model, params):
    """log p of tokens 1.. of each sequence."""
    out = []
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    for ids in SEQUENCES:
        padded = jnp.array([ids + [0] * (24 - len(ids))])  # causal: padding changes nothing
        logp = np.asarray(jax.nn.log_softmax(apply(padded)[0]), np.float64)
        out.append(np.array([logp[t, ids[t + 1]] for t in range(len(ids) - 1)]))
    return out


def test_sequences(model, params, exact):
    starts = [1, 1, 15, 1, 2]
    scores = continuation_log_probs(model, params, SEQUENCES, starts, batch_size=2)
    for row, start, whole in zip(scores, starts, exact, strict=True):
        np.testing.assert_allclose(row, whole[start - 1 :], atol=1e-5)
    total = of_sequences(model, params, SEQUENCES, byte_count=100, batch_size=3)
    assert total.tokens == sum(map(len, exact))
    np.testing.assert_allclose(total.nll, -sum(row.sum() for row in exact), rtol=1e-5)


def test_packed_batches_of_unequal_count(model, params, exact):
    """Two sequences in a row of one batch, one in another: the sum is exact, no mean of means."""
    first, last = SEQUENCES[0], SEQUENCES[2]
    row = np.zeros((1, 12), np.int32)
    packed = {name: row.copy() for name in ("tokens", "targets", "segment_ids", "positions")}
    weights = np.zeros((1, 12), np.float32)
    for start, ids, segment in ((0, first, 1), (7, SEQUENCES[4], 2)):
        n = len(ids) - 1
        packed["tokens"][0, start : start + n] = ids[:-1]
        packed["targets"][0, start : start + n] = ids[1:]
        packed["segment_ids"][0, start : start + n] = segment
        packed["positions"][0, start : start + n] = np.arange(n)
        weights[0, start : start + n] = 0.01 * segment
    batches = [packed | {"weights": weights}, windows([last], [1])]
    result = held_out(model, params, iter(batches), byte_count=64)
    parts = [exact[i] for i in (0, 4, 2)]
    nll = -sum(part.sum() for part in parts)
    assert result.tokens == sum(map(len, parts))
    np.testing.assert_allclose(result.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(result.bits_per_byte, nll / 64 / math.log(2), rtol=1e-5)


def test_hand_numbers():
    """Uniform over 256 at one token a byte: 8 bits a byte."""
    one = Likelihood(10 * math.log(256), 10, 10)
    assert one.perplexity == pytest.approx(256) and one.bits_per_byte == pytest.approx(8)
    both = one + Likelihood(0.0, 30, 10)
    assert both.per_token == pytest.approx(math.log(256) / 4)
    assert both.bits_per_byte == pytest.approx(4)


def test_errors(model, params):
    with pytest.raises(ValueError, match="no token was predicted"):
        of_sequences(model, params, [[5]]).per_token  # noqa: B018
    with pytest.raises(ValueError, match="number of bytes"):
        Likelihood(1.0, 1).bits_per_byte  # noqa: B018
    with pytest.raises(ValueError, match="sequence 1 has 30 tokens; the context is 24"):
        of_sequences(model, params, [[1, 2], [1] * 30])
    with pytest.raises(ValueError, match="start must be at least 1"):
        continuation_log_probs(model, params, [[1, 2]], [0])
