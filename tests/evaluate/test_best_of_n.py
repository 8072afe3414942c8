"""Best-of-n against all choices of n, and its KL against a distribution in full."""

from itertools import combinations

import numpy as np
import pytest

from research.evaluate import best_of_n


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_expectation_over_all_choices(n):
    random = np.random.default_rng(n)
    proxy, value = random.normal(size=(2, 6)), random.normal(size=(2, 6))
    for row in range(2):
        best = [max(chosen, key=proxy[row].item) for chosen in combinations(range(6), n)]
        expected = value[row][best].mean()
        np.testing.assert_allclose(best_of_n.expected(proxy, value, n)[row], expected)


def test_ties_are_broken_evenly():
    assert best_of_n.expected([0, 1, 1], [5, 1, 3], 3) == 2
    assert best_of_n.expected([1, 1, 1], [5, 1, 3], 2) == 3
    np.testing.assert_allclose(best_of_n.expected([0, 1, 1], [5, 1, 3], 2), 2)


def test_kl_is_that_of_the_best_of_many_answers():
    """Of M equally likely answers the i-th is the best of n with chance (i/M)^n − ((i − 1)/M)^n."""
    many, n = 20_000, 8
    chance = np.diff((np.arange(many + 1) / many) ** n)
    exact = (chance * np.log(chance * many + 1e-300)).sum()
    np.testing.assert_allclose(best_of_n.kl(n), exact, rtol=1e-3)
    assert best_of_n.kl(1) == 0


def test_bad_input():
    with pytest.raises(ValueError, match=r"n must be in 1\.\.2, the answers of a prompt; got 3"):
        best_of_n.expected([1, 2], [1, 2], 3)
    with pytest.raises(ValueError, match=r"proxy \(2,\) and value \(3,\)"):
        best_of_n.expected([1, 2], [1, 2, 3], 1)
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n.kl(0)
