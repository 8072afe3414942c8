"""Captured attention against a forward pass in NumPy and transformers' own; statistics by hand."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research import hub
from research.evaluate import attention
from research.models import decoder
from research.models.attention import Attention
from research.models.families.llama import llama
from research.models.linear_attention import LinearAttention
from research.models.position import Alibi, Rope
from research.models.sinks import StreamingAttention
from research.models.stack import Stack

SMALL = llama(11, 3, 12, 4, 2, 16, head_size=6, init_std=0.6, position=Rope(100.0))
ROOT = Path(__file__).parents[1]
RECORDED = load_file(Path(__file__).parent / "fixtures" / "attention_weights.safetensors")
TOKENS = np.array([3, 7, 3, 0, 10, 7, 7, 2])


def windowed(config, *windows):
    (block,) = config.stacks[0].pattern
    blocks = tuple(
        dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=window))
        for window in windows
    )
    return dataclasses.replace(config, stacks=(Stack(config.layers // len(blocks), blocks),))


CONFIGS = {
    "grouped": SMALL,
    "alibi": dataclasses.replace(SMALL, position=Alibi()),
    "window": windowed(SMALL, 3),
    "pattern": windowed(SMALL, None, 2, 4),
}


def made(config):
    """A model whose attention is far from even."""
    model = decoder.Decoder(config)
    params = decoder.init(model, jax.random.key(2))
    return model, jax.tree.map(lambda w: w * 20 if w.ndim == 3 else w, params)


def by_hand(config, params, tokens):
    """The weights of a LLaMA-like model, one query and one head at a time."""
    params = jax.tree.map(np.asarray, params)
    (stack,), eps, T = config.stacks, 1e-5, len(tokens)
    x, found = params["embed"]["table"][tokens], []

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def turn(row, at, H):  # pairs (m, m + H/2) as complex numbers
        z = row[: H // 2] + 1j * row[H // 2 :]
        z = z * np.exp(1j * at * config.position.theta ** (-np.arange(H // 2) / (H // 2)))
        return np.concatenate([z.real, z.imag])

    for index in range(stack.count):
        for place, block in enumerate(stack.pattern):
            p = jax.tree.map(lambda w, i=index: w[i], params["stack_0"][f"block_{place}"])
            a = block.attention
            N, K, H = a.heads, a.kv_heads, a.head_size
            y = norm(x, p["attention_norm"]["scale"])
            q = (y @ p["attention"]["q"]["kernel"]).reshape(T, N, H)
            k, v = ((y @ p["attention"][m]["kernel"]).reshape(T, K, H) for m in "kv")
            weights, out = np.zeros((N, T, T)), np.zeros((T, N, H))
            for n in range(N):
                for i in range(T):
                    seen = [j for j in range(i + 1) if a.window is None or i - j < a.window]
                    if isinstance(config.position, Alibi):
                        slope = 2.0 ** (-8 * (n + 1) / N)
                        scores = [
                            q[i, n] @ k[j, n * K // N] / H**0.5 - slope * (i - j) for j in seen
                        ]
                    else:
                        looks = turn(q[i, n], i, H)
                        scores = [looks @ turn(k[j, n * K // N], j, H) / H**0.5 for j in seen]
                    powers = np.exp(np.array(scores) - max(scores))
                    weights[n, i, seen] = powers / powers.sum()
                    out[i, n] = weights[n, i] @ v[:, n * K // N]
            x = x + out.reshape(T, N * H) @ p["attention"]["o"]["kernel"]
            y = norm(x, p["ffn_norm"]["scale"])
            gate = y @ p["ffn"]["gate"]["kernel"]
            y = gate / (1 + np.exp(-gate)) * (y @ p["ffn"]["up"]["kernel"])
            x = x + y @ p["ffn"]["down"]["kernel"]
            found.append(weights)
    return np.stack(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_captured_weights_equal_those_computed_by_hand(name):
    model, params = made(CONFIGS[name])
    weights, logits = attention.capture(model, params, TOKENS)
    assert weights.shape == (3, 4, 8, 8) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, by_hand(model.config, params, TOKENS), atol=2e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not np.triu(weights, 1).any()
    assert np.ptp(weights[..., -1, :], axis=-1).min() > 0.05  # it is not the even distribution
    plain = jax.jit(model.apply)({"params": params}, TOKENS[None])[0]
    np.testing.assert_allclose(logits, plain, atol=1e-4)


def test_unstacked_parameters_and_recomputed_layers_give_the_same():
    model, params = made(CONFIGS["pattern"])
    want = attention.capture(model, params, TOKENS)
    recomputing = decoder.Decoder(dataclasses.replace(model.config, remat="full"))
    for got in (
        attention.capture(model, decoder.unstack(params), TOKENS),
        attention.capture(recomputing, params, TOKENS),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize("name", ["tiny_llama/gqa", "tiny_gpt/gpt2", "tiny_qwen/alternating"])
def test_captured_weights_equal_those_recorded_from_transformers(name):
    loaded = hub.load(ROOT / "hub" / "fixtures" / name)
    weights, _ = attention.capture(loaded.model, loaded.params, RECORDED[f"{name}.tokens"])
    np.testing.assert_allclose(weights, RECORDED[f"{name}.weights"], atol=1e-5)


@pytest.mark.parametrize(
    "tokens, words",
    [
        (np.zeros((1, 3), int), r"must be ids \[T\], T > 0; got int\d+ \(1, 3\)"),
        (np.zeros(0, int), r"got int\d+ \(0,\)"),
        (np.zeros(3), r"got float\d+ \(3,\)"),
        ([1, 11], r"must be in 0..10; they go from 1 to 11"),
    ],
)
def test_what_is_no_sequence_of_tokens_is_refused(tokens, words):
    model, params = made(SMALL)
    with pytest.raises(ValueError, match=words):
        attention.capture(model, params, tokens)


def test_layers_with_different_numbers_of_heads_are_refused():
    (block,) = SMALL.stacks[0].pattern
    other = dataclasses.replace(block, attention=dataclasses.replace(block.attention, heads=2))
    config = dataclasses.replace(SMALL, stacks=(Stack(1, (block, other)),))
    with pytest.raises(ValueError, match=r"same number of heads; a cycle's have \[4, 2\]"):
        attention.capture(decoder.Decoder(config), {}, TOKENS)


def with_attention(attention):
    """The second of two blocks, of which there are two cycles, has another attention."""
    (block,) = SMALL.stacks[0].pattern
    blocks = (block, dataclasses.replace(block, attention=attention))
    return dataclasses.replace(SMALL, stacks=(Stack(1, (block,)), Stack(2, blocks)))


@pytest.mark.parametrize(
    "other", [LinearAttention(4, 2, 6), StreamingAttention(4, 2, 6, window=3, sinks=1)]
)
def test_attentions_that_do_not_call_attend_are_refused_by_layer(other):
    model, params = made(with_attention(other))
    model.apply({"params": params}, TOKENS[None])  # it is the capture that is refused
    with pytest.raises(ValueError, match=f"layer 2: {type(other).__name__} does not look through"):
        attention.capture(model, params, TOKENS)


def test_streaming_attention_without_sinks_is_captured():
    config = with_attention(StreamingAttention(4, 2, 6, window=3))
    model, params = made(config)
    got, _ = attention.capture(model, params, TOKENS)
    plain = decoder.Decoder(with_attention(Attention(4, 2, 6, window=3)))
    np.testing.assert_array_equal(got, attention.capture(plain, params, TOKENS)[0])
    assert got.shape[0] == 5


# Rows: a first token, then half and half, then a quarter, a half and a quarter.
HAND = jnp.array([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.5, 0.25]])[None, None]


def test_statistics_are_those_reckoned_by_hand():
    found = attention.statistics(HAND, np.array([5, 8, 5]))
    ln2 = np.log(2)
    want = {
        "entropy": (ln2 + 1.5 * ln2) / 2,
        "distance": (0.5 * 1 + 0.25 * 2 + 0.5 * 1) / 2,
        "first": (0.5 + 0.25) / 2,
        "previous": (0.5 + 0.5) / 2,
        "self": (0.5 + 0.25) / 2,
        "equal": 0.25,  # the last 5 on the first
        "induction": 0.5,  # and on the 8 behind it
    }
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].shape == (1, 1)
        assert float(found[name][0, 0]) == pytest.approx(value), name


def test_matches_are_means_over_the_tokens_that_occurred_before():
    weights = jnp.array([[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]])
    tokens = np.array([4, 4, 6, 4])
    # The second 4 matches position 0; the last one 0 and 1, which 1 and 2 come after.
    equal = float(attention.share_of_matches(weights, tokens, 0))
    induction = float(attention.share_of_matches(weights, tokens, 1))
    assert equal == pytest.approx((0.9 + 0.1 + 0.2) / 2)
    assert induction == pytest.approx((0.1 + 0.2 + 0.3) / 2)
    assert np.isnan(attention.share_of_matches(weights, np.arange(4), 1))


def test_statistics_at_their_limits():
    T = 6
    even = jnp.tri(T) / jnp.arange(1, T + 1)[:, None]
    entropies = [np.log(i + 1) for i in range(1, T)]
    assert float(attention.mean_entropy(even)) == pytest.approx(np.mean(entropies))
    alone = jnp.eye(T)
    assert float(attention.mean_entropy(alone)) == 0
    assert float(attention.mean_distance(alone)) == 0
    with pytest.raises(ValueError, match="two tokens or more"):
        attention.mean_entropy(jnp.ones((1, 1)))
    with pytest.raises(ValueError, match=r"token ids \[3\], not \(2,\)"):
        attention.statistics(HAND, np.array([1, 2]))


def test_rollout_is_the_product_reckoned_by_hand():
    one = jnp.array([[[1, 0], [1, 0]], [[1, 0], [0, 1]]])  # two heads, mean [[1, 0], [.5, .5]]
    two = jnp.array([[[1, 0], [1, 0]], [[1, 0], [1, 0]]])
    found = attention.rollout(jnp.stack([one, two]).astype(jnp.float32))
    # A_1 = [[1, 0], [.25, .75]]; A_2 = [[1, 0], [.5, .5]]; A_2 A_1 = [[1, 0], [.625, .375]]
    np.testing.assert_allclose(found, [[[1, 0], [0.25, 0.75]], [[1, 0], [0.625, 0.375]]])


def test_rollout_rows_sum_to_one_and_stay_causal():
    model, params = made(SMALL)
    found = attention.rollout(attention.capture(model, params, TOKENS)[0])
    assert found.shape == (3, 8, 8)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert not np.triu(found, 1).any()
