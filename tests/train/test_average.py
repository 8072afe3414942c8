"""SWA against the mean of the parameters step by step; soups by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from perceptron import assert_bitwise, objective, params, source

from research.train.average import SWA, greedy_soup, uniform_soup
from research.train.loop import Training, fit
from research.train.optim import AdamW


def train(steps, **options):
    config = Training(steps=steps, **options)
    return fit(objective, source(), params(), AdamW(0.05), config)


def test_swa_is_the_mean_of_the_chosen_steps():
    """Steps 3, 5 and 7 of 8; a run of n steps ends where a longer one is after n."""
    got = train(8, swa=SWA(3, 2)).ema
    chosen = [train(step).params for step in (3, 5, 7)]
    want = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *chosen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_swa_of_one_step_and_before_its_start_is_the_parameters():
    for swa, steps in ((SWA(4, 9), 4), (SWA(9), 4)):
        fitted = train(steps, swa=swa)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            fitted.ema,
            fitted.params,
        )


def test_the_average_is_evaluated_and_goes_on_after_a_stop(tmp_path):
    seen = []

    def evaluate(tree):
        seen.append(tree)
        return {"error": 0.0}

    def part(steps):
        config = Training(steps=steps, swa=SWA(2), directory=tmp_path)
        return fit(objective, source(), params(), AdamW(0.05), config, evaluate=evaluate)

    part(3)
    resumed = part(6)
    assert_bitwise(resumed.state, train(6, swa=SWA(2)).state)
    assert_bitwise(seen[-1], resumed.ema)
    with pytest.raises(ValueError, match=r"training.swa"):
        config = Training(steps=6, directory=tmp_path)
        fit(objective, source(), params(), AdamW(0.05), config)


def scalar(value):
    return {"w": jnp.array([value], jnp.float32), "b": {"scale": jnp.ones(2, jnp.bfloat16)}}


def test_a_uniform_soup_is_the_mean_in_the_dtypes_of_the_first():
    soup = uniform_soup([scalar(1.0), scalar(2.0), scalar(6.0)])
    assert float(soup["w"][0]) == 3
    assert soup["b"]["scale"].dtype == jnp.bfloat16
    assert_bitwise(uniform_soup([scalar(1.5)]), scalar(1.5))


def test_a_greedy_soup_by_hand():
    """Value -|w - 2|: 2.5, then 1 (mean 1.75, better); 5 and -4 make it worse and stay out."""
    seen = []

    def evaluate(tree):
        seen.append(float(tree["w"][0]))
        return -abs(seen[-1] - 2)

    soup, chosen = greedy_soup([scalar(w) for w in (5.0, 1.0, 2.5, -4.0)], evaluate)
    assert chosen == (2, 1)
    assert float(soup["w"][0]) == 1.75
    np.testing.assert_allclose(seen[4:], [1.75, 8.5 / 3, -0.5 / 3], rtol=1e-6)


def test_equal_models_all_stay():
    soup, chosen = greedy_soup([scalar(1.0)] * 3, lambda tree: 0.0)
    assert chosen == (0, 1, 2)
    assert_bitwise(soup, scalar(1.0))


def test_refusals():
    other = scalar(1.0) | {"b": {"bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"trees 0 and 1 .*b/bias is absent and \(2,\)"):
        uniform_soup([scalar(1.0), other])
    with pytest.raises(ValueError, match=r"w is \(1,\) and \(3,\)"):
        greedy_soup([scalar(1.0), scalar(1.0) | {"w": jnp.ones(3)}], lambda tree: 0.0)
    with pytest.raises(ValueError, match="at least one tree"):
        uniform_soup([])
    with pytest.raises(ValueError, match="codes is int8"):
        uniform_soup([{"codes": jnp.ones(2, jnp.int8)}])
    with pytest.raises(ValueError, match=r"SWA.every must be at least 1"):
        SWA(1, 0)
    with pytest.raises(ValueError, match="two averages"):
        Training(2, ema_decay=0.9, swa=SWA(1))
