"""Measures of order against scipy, hand numbers and limits."""

import numpy as np
import pytest
import scipy.stats

from research.evaluate import ranking

RANDOM = np.random.default_rng(0)
PAIRS = {
    "continuous": tuple(RANDOM.normal(size=(2, 40))),
    "with ties": tuple(RANDOM.integers(0, 5, (2, 40))),
    "opposite": (np.arange(9), -np.arange(9)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_correlations_of_ranks_are_scipys(name):
    a, b = PAIRS[name]
    assert ranking.kendall_tau(a, b) == pytest.approx(scipy.stats.kendalltau(a, b).statistic)
    assert ranking.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    np.testing.assert_allclose(ranking.ranks(a), scipy.stats.rankdata(a))


def test_a_constant_has_no_order():
    assert np.isnan(ranking.kendall_tau([1, 1, 1], [1, 2, 3]))
    assert np.isnan(ranking.spearman([1, 2, 3], [1, 1, 1]))


def test_pairs_and_wins_by_hand():
    assert ranking.pairwise_accuracy([3, 1, 2, 2], [1, 3, 2, 0]) == (1 + 0 + 0.5 + 1) / 4
    rate, low, high = ranking.win_rate(30, 10, 10)
    assert rate == 0.7 and 0.55 < low < 0.7 < high < 0.82
    with pytest.raises(ValueError, match="0 wins, 0 losses and 0 ties: nothing was judged"):
        ranking.win_rate(0, 0)


def test_gains_by_hand():
    """Relevance 3, 0, 2 in the order of the scores: (7 + 3/2) / (7 + 3/log2(3))."""
    scores, relevance = np.array([0.1, 0.9, 0.5]), np.array([2, 3, 0])
    best = 7 + 3 / np.log2(3)
    assert ranking.ndcg(scores, relevance) == pytest.approx((7 + 3 / 2) / best)
    assert ranking.ndcg(scores, relevance, k=1) == 1
    assert ranking.ndcg(scores, np.zeros(3)) == 0
    assert ranking.reciprocal_rank(scores, [1, 0, 0]) == 1 / 3
    assert ranking.reciprocal_rank(scores, [0, 0, 0]) == 0
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        ranking.ndcg(scores, relevance, 0)


def test_calibration_by_hand():
    """Two bins: mean 0.25 of which 0.5 happened, mean 0.9 of which all did."""
    found = ranking.expected_calibration_error([0.2, 0.3, 0.9], [1, 0, 1], bins=2)
    assert found == pytest.approx((2 * 0.25 + 1 * 0.1) / 3)
    random = np.random.default_rng(1)
    p = random.uniform(size=200_000)
    assert ranking.expected_calibration_error(p, random.uniform(size=p.size) < p) < 0.01
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        ranking.expected_calibration_error([1.2], [1])


def test_lengths_that_disagree_are_named():
    with pytest.raises(ValueError, match=r"two equal arrays of one axis, not \(2,\) and \(3,\)"):
        ranking.spearman([1, 2], [1, 2, 3])
