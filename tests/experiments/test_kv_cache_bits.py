"""Bytes of caches by hand, likelihood token by token, errors along channels, and made-up rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kv_cache_bits
from experiments.kv_cache_bits import BASE, KINDS, SWEEP
from experiments.shared import kept_cache
from research.decode.generate import for_decoding
from research.models import decoder
from research.models.families.llama import llama
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.weights.formats import Integer

MODEL = decoder.Decoder(
    llama(32, 2, 32, 2, 1, 32, init_std=0.3)
)  # one head of 16 keeps keys and values


@pytest.mark.parametrize(
    "keys, values, per_head",
    [
        (None, None, 2 * 16 * 4),
        (Integer(8, "row"), Integer(8, "row"), 2 * (16 + 2)),
        (Integer(4, 8), None, 8 + 2 * 2 + 16 * 4),
        (Integer(2, 8, "minimum"), Integer(2, 8, "minimum"), 2 * (4 + 2 * 2 * 2)),
    ],
)
def test_bytes_by_hand(keys, values, per_head):
    model = kept_cache.with_storage(MODEL, keys, values)
    assert kept_cache.bytes_per_token(model) == 2 * per_head  # two layers


@pytest.fixture(scope="module")
def params():
    """Layers that are larger than they begin, so that their rounding is seen."""
    begun = decoder.init(MODEL, jax.random.key(0))
    return begun | {"stack_0": jax.tree.map(lambda w: 4 * w, begun["stack_0"])}


@partial(jax.jit, static_argnums=0)
def one(model, params, token, cache):
    logits, cache = model.apply({"params": params}, token, cache=cache)
    return jax.nn.log_softmax(logits[0, 0]), cache


def test_text_read_at_once_is_text_read_token_by_token(params):
    cached = kept_cache.with_storage(MODEL, Integer(2, "row", "minimum"), Integer(4, "row"))
    windows = np.random.default_rng(0).integers(0, 32, size=(2, 8)).astype(np.int32)
    found = kept_cache.compare(MODEL, cached, params, windows)
    for number, window in enumerate(windows):
        p = np.asarray(jax.nn.log_softmax(MODEL.apply({"params": params}, window[None, :-1])[0]))
        cache, q = decoder.empty_cache(cached, 1, 7), []
        for token in window[:-1]:
            said, cache = one(cached, params, jnp.full((1, 1), token), cache)
            q.append(np.asarray(said))
        at = np.arange(7), window[1:]
        np.testing.assert_allclose(found.full[number], -p[at].mean(), rtol=1e-5)
        np.testing.assert_allclose(found.nll[number], -np.array(q)[at].mean(), rtol=1e-5)
        divergence = (np.exp(p) * (p - q)).sum(-1).mean()
        assert divergence > 1e-4
        np.testing.assert_allclose(found.divergence[number], divergence, rtol=1e-3)
        same = np.mean(p.argmax(-1) == np.argmax(q, -1))
        np.testing.assert_allclose(found.agreement[number], same, rtol=1e-6)


def test_a_plain_cache_changes_nothing(params):
    windows = np.random.default_rng(1).integers(0, 32, size=(2, 8)).astype(np.int32)
    plain = kept_cache.with_storage(MODEL, None, None)
    found = kept_cache.compare(MODEL, plain, params, windows)
    np.testing.assert_allclose(found.nll, found.full, rtol=1e-6)
    np.testing.assert_allclose(found.divergence, 0, atol=1e-6)
    with pytest.raises(ValueError, match=r"windows are \[n, T\], n > 0, T >= 2; got \(2, 1\)"):
        kept_cache.compare(MODEL, plain, params, windows[:, :1])
    keys, values = kept_cache.keys_and_values(MODEL, params, jnp.asarray(windows))
    assert keys.shape == values.shape == (2, 2, 8, 1, 16)
    assert kept_cache.seconds_per_token(plain, for_decoding(params), context=5, count=2) > 0


def test_one_large_channel_spoils_a_tokens_scale_and_not_its_own():
    """x [L, B, T, K, H] of ones but for a channel of 100: along channels every number is exact."""
    x = jnp.ones((1, 1, 6, 1, 8)).at[..., 3].set(100.0)
    along_tokens, along_channels = kept_cache.errors(x, Integer(4, "row"))
    # A step is 100 / 7, so that each of the seven ones of a token becomes 0.
    assert along_tokens == pytest.approx(np.sqrt(7 / (7 + 100**2)), rel=1e-4)
    assert along_channels == pytest.approx(0, abs=1e-6)
    assert kept_cache.channel_outliers(x) == pytest.approx(100)
    assert kept_cache.errors(x, None) == (0, 0)


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"context": 5}]):
        config = override(BASE, overrides)
        metrics = {"perplexity": 20.0 + number, "full_perplexity": 20.0}
        metrics |= {"rise": 0.01 * number, "rise_se": 0.002}
        metrics |= {"divergence": 0.02, "divergence_se": 0.001}
        metrics |= {
            "bytes_per_token": 46_080.0 / (1 + number),
            "bits_per_number": 32 / (1 + number),
        }
        for kind in ("key", "value"):
            metrics |= {f"{kind}_error": 0.1, f"{kind}_error_channels": 0.05}
            metrics |= {f"{kind}_outliers": 7.0}
        metrics["s_per_token"] = 0.05
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    text = kv_cache_bits.table(made_up())
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2 : 2 + len(KINDS)]] == list(KINDS)
    assert "1.01 ± 0.2" in lines[3] and "23,040" in lines[3]
    costs, kept = kv_cache_bits.figure(made_up()).axes
    assert len(costs.containers) == len(KINDS) - 1 and costs.get_yscale() == "log"
    assert len(kept.lines) == 3  # keys, values, and where both are equal
