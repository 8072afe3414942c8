"""Scores of pairs through a model; temperatures and calibration against searches and simulation."""

import jax
import numpy as np
import pytest

from research.data.preferences import ExamplePair, pair_rows
from research.data.supervised import shift
from research.evaluate.reward_models import (
    calibrated_temperature,
    calibration_error,
    pair_loss,
    pair_scores,
)
from research.models import decoder, heads
from research.models.families.llama import llama
from research.objectives import answer_scores

MODEL = decoder.Decoder(llama(40, 1, 16, 2, 1, 32, head_size=8, tied=True, init_std=0.4))
HEAD = heads.Head(1, init_std=1.0)


def test_batches_of_rows_do_not_matter():
    plain = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
    params, random = heads.add(plain, HEAD, 16, jax.random.key(1)), np.random.default_rng(0)
    example = lambda n: shift(random.integers(0, 40, n), np.ones(n))  # noqa: E731
    table = pair_rows([ExamplePair(example(3 + i), example(8 - i)) for i in range(5)], 12)
    whole = answer_scores(MODEL, HEAD, params, table)
    for rows in (1, 3, 5):
        np.testing.assert_allclose(pair_scores(MODEL, HEAD, params, table, rows), whole, atol=1e-5)


@pytest.fixture
def overconfident():
    """Margins of 4,000 pairs that are three times what the chances say."""
    random = np.random.default_rng(1)
    truth = random.normal(0, 1.5, 4000)
    right = random.random(4000) < 1 / (1 + np.exp(-truth))
    return 3 * np.where(right, truth, -truth)


def test_the_temperature_is_the_best_and_calibrates(overconfident):
    found = calibrated_temperature(overconfident)
    assert 2.7 < found < 3.3
    losses = [pair_loss(overconfident, t) for t in np.linspace(0.9, 1.1, 21) * found]
    assert np.argmin(losses) == 10
    assert calibration_error(overconfident, found) < 0.02 < 0.1 < calibration_error(overconfident)
    np.testing.assert_allclose(calibrated_temperature(5 * overconfident), 5 * found, rtol=1e-6)


def test_by_hand():
    assert pair_loss([0.0, 0.0]) == pytest.approx(np.log(2))
    # σ(1) = 0.731 sure and half of them right
    assert calibration_error([1, -1]) == pytest.approx(1 / (1 + np.exp(-1)) - 0.5)
    assert calibration_error([0, 0, 0]) == 0
    assert calibrated_temperature([np.log(3)] * 3 + [-np.log(3)]) == pytest.approx(1)


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, 0.5], [], [np.nan, 1, -1], [[1.0, -0.5]]])
def test_margins_without_a_best_temperature(margins):
    with pytest.raises(ValueError, match=r"no temperature is best|expected finite margins"):
        calibrated_temperature(np.array(margins))
