"""Statistics as gradients of observers, against the same layers called by hand."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import decoder
from research.models.families.llama import llama
from research.paths import RuleError
from research.quantize import calibrate, measures
from research.weights import lora, observed

CONFIG = llama(50, 3, 24, 6, 2, 32, head_size=8, max_length=64, init_std=0.4)
MODEL = decoder.Decoder(CONFIG)
DOWN = "stack_0/block_0/ffn/down/kernel"
Q = "stack_0/block_0/attention/q/kernel"
K = "stack_0/block_0/attention/k/kernel"


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def windows():
    return np.asarray(jax.random.randint(jax.random.key(1), (6, 9), 0, 50))


def rms(x):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG.final_norm.eps)


def measured(params, windows, rule, measure=measures.absmax, combine=jnp.maximum, model=MODEL):
    return calibrate.measure(model, params, windows, rule, measure, combine, batch_size=4)


def test_the_first_layers_inputs_are_the_normed_embeddings(params, windows):
    x = rms(np.asarray(params["embed"]["table"])[windows]).reshape(-1, 24)
    found = measured(params, windows, rf"{Q}|{K}")
    assert found.keys() == {Q, K} and found[Q].shape == (3, 24)
    np.testing.assert_allclose(found[Q][0], np.abs(x).max(0), rtol=1e-5)
    np.testing.assert_array_equal(found[Q], found[K])
    second = measured(params, windows, Q, measures.second, jnp.add)[Q]
    np.testing.assert_allclose(second["sum"][0], x.T @ x, rtol=1e-4, atol=1e-4)
    assert second["rows"].tolist() == [54, 54, 54]
    mean = measured(params, windows, Q, measures.magnitude, jnp.add)[Q]
    np.testing.assert_allclose(mean["sum"][0], np.abs(x).sum(0), rtol=1e-5)


def test_a_tied_heads_inputs_are_the_last_states(windows):
    model = decoder.Decoder(dataclasses.replace(CONFIG, head=None))
    params = decoder.init(model, jax.random.key(0))
    states = model.apply({"params": params}, windows, method="hidden")
    found = measured(params, windows, "embed/table", model=model)["embed/table"]
    np.testing.assert_allclose(found, jnp.abs(states).max((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("change", [{"scan": False}, {"remat": "full"}])
def test_every_way_to_run_the_layers_measures_the_same(params, windows, change):
    model = decoder.Decoder(dataclasses.replace(CONFIG, **change))
    expected = measured(params, windows, rf"{DOWN}|{Q}")
    found = measured(params, windows, rf"{DOWN}|{Q}", model=model)
    for name, statistic in expected.items():
        np.testing.assert_allclose(found[name], statistic, rtol=1e-5)


def test_the_layers_below_an_observer_see_what_they_saw(params, windows):
    adapted = lora.add(params, DOWN, jax.random.key(2), rank=2)
    watched = observed.add(adapted, r".*/kernel", measures.absmax)
    plain = MODEL.apply({"params": adapted}, windows)
    np.testing.assert_array_equal(MODEL.apply({"params": watched}, windows), plain)
    again = observed.remove(watched)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    grad = jax.grad(lambda p: MODEL.apply({"params": p}, windows).sum())
    expected = grad(params)["stack_0"]["block_0"]["ffn"]["down"]["kernel"]
    found = grad(observed.add(params, Q, measures.absmax))
    np.testing.assert_allclose(
        found["stack_0"]["block_0"]["ffn"]["down"]["kernel"], expected, rtol=1e-4, atol=1e-5
    )


def test_bad_input(params):
    with pytest.raises(ValueError, match="at least one window"):
        measured(params, np.zeros((0, 4), np.int32), Q)
    with pytest.raises(RuleError, match="matches none"):
        measured(params, np.zeros((1, 4), np.int32), "nothing")
    with pytest.raises(ValueError, match="need 12; the text has 11 tokens"):
        calibrate.windows_of(range(11), 4, 3)
    assert calibrate.windows_of(range(12), 4, 3).shape == (3, 4)
    with pytest.raises(ValueError, match=f"the measure of {Q} needs something given"):
        observed.add(params, Q, measures.Histogram(4), {})


def test_windows_and_batches_that_are_none(params):
    measure = partial(
        calibrate.measure,
        MODEL,
        params,
        rule=DOWN,
        measurement=measures.absmax,
        combine=jnp.maximum,
    )
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        measure(np.ones((2, 4), np.int32), batch_size=0)
    with pytest.raises(ValueError, match=r"windows must be \[n, T\] of tokens, not \(4,\)"):
        measure(np.ones(4, np.int32))


def test_the_first_token_of_a_window_may_count_more():
    x = jnp.arange(12.0).reshape(6, 2)
    found = measures.SecondOfWindows(3, 50.0)(x)
    wanted = sum(
        w * np.outer(row, row) for w, row in zip([50, 1, 1, 50, 1, 1], np.asarray(x), strict=True)
    )
    np.testing.assert_allclose(found["sum"], wanted)
    assert found["rows"] == 104
    np.testing.assert_array_equal(
        measures.SecondOfWindows(3, 1.0)(x)["sum"], measures.second(x)["sum"]
    )
