"""Bytes of caches by hand, errors along channels, and the table and figure of made-up rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kv_cache_bits
from experiments.kv_cache_bits import BASE, KINDS, SWEEP
from experiments.shared import few_bits, kept_cache
from research.models import decoder
from research.models.families.llama import llama
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.weights.formats import Integer

MODEL = decoder.Decoder(llama(32, 2, 32, 2, 1, 32))  # one head of 16 keeps keys and values


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


def test_percent_by_hand():
    assert few_bits.percent({"rise": np.log(1.02), "rise_se": 0.01}) == pytest.approx((2, 1.02))
