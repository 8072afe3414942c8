"""AWQ: factors and errors against explicit activations, and outputs that are never worse."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import built, close, logits, windows

from research.models.families.gpt import gpt
from research.models.families.llama import llama
from research.quantize import awq, calibrate, measures
from research.quantize.rescale import INPUTS, all_pairs, inject_outliers, leaf
from research.weights.base import dense, merge
from research.weights.formats import Codebook, Integer, rounded
from research.weights.quantized import quantize

LLAMA = llama(50, 2, 24, 3, 3, 32, head_size=8)
FORMAT = Integer(3, 8, "integer")
BLOCK = "stack_0/block_0"


def measured(model, params):
    return calibrate.measure(model, params, windows(), INPUTS, measures.moments, jnp.add)


def moments_of(x):
    """What is measured of inputs [L, rows, in], in numpy."""
    rows = np.full(len(x), x.shape[1])
    found = {"magnitude": np.abs(x).sum(1), "second": np.einsum("lma,lmb->lab", x, x), "rows": rows}
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}


@pytest.fixture(scope="module")
def salient():
    """(model, params, inputs {kernel: [L, rows, in]}) where some inputs are 20 times as large."""
    model, params = built(LLAMA)
    rng, inputs = np.random.default_rng(2), {}
    for pair in all_pairs(model, params):
        width = leaf(params, pair.key).shape[1]
        x = rng.normal(size=(2, 60, width)) @ rng.normal(size=(2, width, width))
        x[:, :, [3, 17]] *= 20
        inputs[pair.key] = x
    return model, params, inputs


@pytest.fixture(scope="module")
def moments(salient):
    return {name: moments_of(x) for name, x in salient[2].items()}


def test_factors_and_errors_are_those_of_explicit_inputs(salient, moments):
    name = f"{BLOCK}/ffn/down/kernel"
    w, x = np.asarray(leaf(salient[1], name), np.float64), salient[2][name]
    mean = moments[name]["magnitude"] / moments[name]["rows"][:, None]
    for ratio in (0.0, 0.35, 0.95):
        power = np.maximum(np.abs(x).mean(1) ** ratio, 1e-4)
        s = power / np.sqrt(power.max(1) * power.min(1))[:, None]
        found = awq.factors(mean, ratio)
        np.testing.assert_allclose(found, s, rtol=1e-4)
        quantized = rounded((jnp.asarray(w, jnp.float32) * found[..., None]).mT, FORMAT).mT
        y = (x / np.asarray(found)[:, None]) @ np.asarray(quantized, np.float64)
        error = awq.output_errors(
            jnp.asarray(w, jnp.float32), found, moments[name]["second"], FORMAT
        )
        np.testing.assert_allclose(error, np.square(y - x @ w).sum((1, 2)), rtol=1e-3)


def test_the_function_of_a_model_stays_and_rounding_harms_it_less():
    model, params = built(LLAMA)
    params = inject_outliers(model, params, [3, 17], 20.0)
    found = measured(model, params)
    scaled = awq.scale(model, params, found, FORMAT)
    close(model, params, scaled.params)
    for name, expected in measured(model, scaled.params).items():
        for part, value in expected.items():
            near = {"rtol": 2e-3, "atol": 2e-4 * np.abs(value).max()}
            np.testing.assert_allclose(scaled.moments[name][part], value, **near)
    exact, nearest = logits(model, params), quantize(params, awq.MATRICES, FORMAT)
    done = awq.quantize(model, params, found, FORMAT)
    error, naive = (np.square(logits(model, merge(p)) - exact).mean() for p in (done, nearest))
    assert error < 0.6 * naive


def effective(name, quantized, scaled, params):
    """[L, in, out]: what the rounded matrix does to the inputs and outputs of the model as it was."""
    w = np.asarray(dense(leaf(quantized, name)), np.float64)

    def ratio(of):
        return np.asarray(leaf(scaled, of) / leaf(params, of), np.float64)

    if name.endswith(("q/kernel", "k/kernel", "v/kernel")):
        w = w * ratio(f"{BLOCK}/attention_norm/scale")[..., None]
    if name.endswith(("up/kernel", "gate/kernel")):
        w = w * ratio(f"{BLOCK}/ffn_norm/scale")[..., None]
    if name.endswith(("o/kernel", "down/kernel")):
        return w / ratio(name)[..., :1]
    reader = {"v": "attention/o", "up": "ffn/down"}.get(name.split("/")[-2])
    return w * ratio(f"{BLOCK}/{reader}/kernel")[..., None, :, 0] if reader else w


@pytest.mark.parametrize("format", [FORMAT, Integer(4, "row"), Codebook(group=8)], ids=str)
def test_outputs_are_nowhere_worse_than_by_rounding_to_nearest(salient, moments, format):
    model, params, inputs = salient
    clipped = awq.CLIPPED if isinstance(format, Integer) else None
    done = awq.quantize(model, params, moments, format, clipped=clipped)
    scaled = awq.scale(model, params, moments, format).params
    nearest = quantize(params, awq.MATRICES, format)
    for pair in all_pairs(model, params):
        before = after = 0
        for name in pair.readers:
            w = np.asarray(leaf(params, name), np.float64)
            rounded_to_nearest = np.asarray(dense(leaf(nearest, name)), np.float64)
            x = inputs[pair.key]
            before += np.square(x @ (rounded_to_nearest - w)).sum((1, 2))
            after += np.square(x @ (effective(name, done, scaled, params) - w)).sum((1, 2))
        assert (after < 0.6 * before).all(), pair.source  # there are salient channels everywhere


def test_nothing_changes_where_nothing_is_chosen(salient, moments):
    """With one ratio, 0, every factor is 1, and quantizing is rounding to nearest."""
    model, params, _ = salient
    same = awq.scale(model, params, moments, FORMAT, ratios=[0.0])
    for pair in all_pairs(model, params):
        for name in (*pair.written, *pair.readers):
            np.testing.assert_array_equal(leaf(same.params, name), leaf(params, name))
        assert same.ratios[pair.source].tolist() == [0, 0]


def test_what_shares_values_or_has_no_gate_is_not_scaled():
    def sources(config):
        return {pair.source.removeprefix(f"{BLOCK}/") for pair in all_pairs(*built(config))}

    norms = {"attention_norm", "ffn_norm"}
    assert sources(LLAMA) == norms | {"attention/v", "ffn/up"}
    assert sources(llama(50, 2, 24, 6, 2, 32, head_size=4)) == norms | {"ffn/up"}
    config = gpt(50, 2, 24, 3, 32)
    assert sources(config) == norms | {"attention/v"}
    model, params = built(config)  # with biases on v and o
    done = awq.scale(model, params, measured(model, params), Integer(3, 8))
    assert max(ratio.max() for ratio in done.ratios.values()) > 0
    close(model, params, done.params)


def test_bad_input(salient, moments):
    model, params, found = *salient[:2], moments
    with pytest.raises(ValueError, match=r"q/kernel \(2, 24, 24\): groups of 16 do not fill 24"):
        awq.quantize(model, params, found, Integer(4, 16))
    without = {name: x for name, x in found.items() if "down" not in name}
    with pytest.raises(ValueError, match=r"say nothing of the inputs of .*ffn/down/kernel"):
        awq.scale(model, params, without, FORMAT, [0.5])
    with pytest.raises(ValueError, match="needs an Integer format"):
        awq.quantize(model, params, found, Codebook(group=8))
    with pytest.raises(ValueError, match="at least one ratio"):
        awq.scale(model, params, found, FORMAT, [])
    wrong = found | {f"{BLOCK}/attention/q/kernel": found[f"{BLOCK}/ffn/down/kernel"]}
    with pytest.raises(ValueError, match=r"q/kernel are \(2, 32, 32\), not \(2, 24, 24\)"):
        awq.scale(model, params, wrong, FORMAT)
