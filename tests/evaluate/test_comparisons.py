"""Strengths from comparisons: recovered, by hand, and where there are none."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from research.evaluate import comparisons

TRUE = np.array([-1.0, -0.2, 0.3, 0.9])


def drawn(chance, count=4000):
    random, n = np.random.default_rng(0), len(TRUE)
    wins = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1, n):
            wins[i, j] = random.binomial(count, chance(TRUE[i] - TRUE[j]))
            wins[j, i] = count - wins[i, j]
    return wins


@pytest.mark.parametrize(
    ("model", "chance"),
    [
        (comparisons.bradley_terry, scipy.special.expit),
        (comparisons.thurstone, lambda d: scipy.stats.norm.cdf(d / np.sqrt(2))),
    ],
)
def test_strengths_are_found_again(model, chance):
    found = comparisons.fit(drawn(chance), model)
    np.testing.assert_allclose(found, TRUE - TRUE.mean(), atol=0.06)
    assert abs(found.sum()) < 1e-5


def test_two_players_by_hand():
    """log-odds of the wins: ln 3."""
    found = comparisons.fit(np.array([[0, 30], [10, 0]]))
    assert found[0] - found[1] == pytest.approx(np.log(3), abs=1e-4)


def test_orders():
    two = comparisons.plackett_luce(jnp.array([0.7, -0.4]))
    assert two == pytest.approx(float(comparisons.bradley_terry(0.7, -0.4)), rel=1e-6)
    s = np.array([0.5, 1.0, -0.3])
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    total = sum(np.exp(float(comparisons.plackett_luce(jnp.array(s[o])))) for o in orders)
    assert total == pytest.approx(1, rel=1e-5)


def test_players_that_never_lose_have_no_strength():
    with pytest.raises(ValueError, match="some players never lost"):
        comparisons.fit(np.array([[0, 5, 5], [0, 0, 3], [0, 2, 0]]))
    for wins in (np.ones((2, 3)), np.eye(2), -np.ones((2, 2))):
        with pytest.raises(ValueError, match=r"wins must be \[n, n\]"):
            comparisons.fit(wins)


def test_elo_by_hand_and_its_interval():
    np.testing.assert_allclose(comparisons.elo([(0, 1, 1.0)], 2), [1516, 1484])
    ratings = comparisons.elo([(0, 1, 1.0), (0, 1, 0.5)], 2)
    expected = 1 / (1 + 10 ** (-32 / 400))
    assert ratings[0] == pytest.approx(1516 + 32 * (0.5 - expected))
    random = np.random.default_rng(0)
    matches = [(0, 1, float(random.random() < 0.75)) for _ in range(400)]
    median, low, high = comparisons.elo_interval(matches, 2).T
    assert low[0] < median[0] < high[0]
    assert median[0] - median[1] == pytest.approx(400 * np.log10(3), abs=60)
    with pytest.raises(ValueError, match="at least one match"):
        comparisons.elo_interval([], 2)


def test_circles():
    rock = np.array([[0, 9, 1], [1, 0, 9], [9, 1, 0]])
    assert comparisons.cyclic_triads(rock) == 1
    assert comparisons.cyclic_triads(drawn(scipy.special.expit)) == 0
    n = 5
    around = np.array([[9 if (j - i) % n in (1, 2) else 1 for j in range(n)] for i in range(n)])
    np.fill_diagonal(around, 0)
    found, p = comparisons.intransitivity(around)
    assert found == 5 and p < 0.05
    _, p = comparisons.intransitivity(drawn(scipy.special.expit, 40))
    assert p > 0.1
