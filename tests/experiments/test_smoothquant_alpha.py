"""What static scales are made of after smoothing, outlier ratios by hand, and made-up rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import smoothquant_alpha
from experiments.shared import outlier_ratios
from experiments.smoothquant_alpha import ALPHAS, BASE, ROUNDINGS, SWEEP, absmax_after, rounded
from research.models import decoder
from research.models.families.llama import llama
from research.quantize import calibrate, measures, smooth
from research.quantize.rescale import INPUTS
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.weights.int8 import QuantizedInputs

MODEL = decoder.Decoder(llama(32, 2, 32, 2, 1, 32, init_std=0.3))
EVERY = r"stack_0/.*/kernel"
WINDOWS = np.random.default_rng(0).integers(0, 32, size=(2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def absmax(params):
    return calibrate.measure(MODEL, params, WINDOWS, INPUTS, measures.absmax, jnp.maximum)


def test_largest_inputs_after_smoothing_are_those_of_another_pass(params, absmax):
    smoothed = smooth.smooth(MODEL, params, absmax, 0.5)
    found = absmax_after(MODEL, params, smoothed, absmax)
    again = calibrate.measure(MODEL, smoothed, WINDOWS, EVERY, measures.absmax, jnp.maximum)
    assert found.keys() == again.keys() and len(found) == 7
    for name, largest in found.items():
        np.testing.assert_allclose(largest, again[name], rtol=1e-4, err_msg=name)


def test_the_inputs_of_down_may_have_a_rounding_of_their_own(params, absmax):
    found = absmax_after(MODEL, params, params, absmax)
    block = rounded(params, found, ROUNDINGS["per tensor, down per token"])["stack_0"]["block_0"]
    assert block["ffn"]["down"]["kernel"].per == "token"
    assert block["ffn"]["up"]["kernel"].per == "tensor"
    static = rounded(params, found, ROUNDINGS["static (O3)"])
    every = jax.tree.leaves(static, is_leaf=lambda w: isinstance(w, QuantizedInputs))
    inputs = [w for w in every if isinstance(w, QuantizedInputs)]
    assert len(inputs) == 7 and all(w.per == "static" and w.scale.shape == (2,) for w in inputs)


def test_ratios_by_hand():
    name = "stack_0/block_0/ffn/down/kernel"
    ratios = outlier_ratios.of_inputs({name: jnp.array([[1.0, 2, 30], [1, 4, 4]])})
    np.testing.assert_allclose(ratios["ffn/down"], [15, 1])
    row = outlier_ratios.metrics_of(ratios | {"attention/q": np.array([3.0, 2.0])})
    assert outlier_ratios.worst(row) == (15.0, "ffn/down, layer 0")


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"text.length": 5}]):
        config = override(BASE, overrides)
        rise = 0.02 + 0.001 * number * (1 if number > 3 else -1)
        metrics = {"perplexity": 20 * float(np.exp(rise)), "full_perplexity": 20.0}
        metrics |= {"rise": rise, "rise_se": 0.001, "divergence": 0.02}
        metrics |= {"outlier/ffn/down": 2000.0, "outlier_layer/ffn/down": 1.0}
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    text = smoothquant_alpha.table(made_up())
    assert text.count("ffn/down, layer 1") == len(SWEEP)
    assert "alpha 0.5 is best with 1.71 %, not above 2.02 % without smoothing, within 2 %" in text
    curve, others, ratios = smoothquant_alpha.figure(made_up()).axes
    assert len(others.patches) == len(SWEEP) - len(ALPHAS)
    assert len(ratios.lines) == len(ALPHAS) and curve.get_title() == "real model, per token"


def test_a_table_of_some_runs_says_nothing_of_the_best():
    assert "is best" not in smoothquant_alpha.table(made_up()[-3:])
