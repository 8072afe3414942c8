"""The hash that drops attention probabilities looks random along every index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.blockwise import blockwise
from research.kernels.dropout import kept, seed_of
from research.kernels.mask import Mask

HEADS, T, S, RATE = 6, 128, 160, 0.25


def factors(key, rate=RATE):
    heads = jnp.arange(HEADS)[:, None, None]
    return np.asarray(kept(seed_of(key), heads, jnp.arange(T)[:, None], jnp.arange(S), rate))


def test_each_is_kept_with_its_rate_and_the_mean_is_one(key):
    found = factors(key)
    assert set(np.unique(found)) == {0, np.float32(1 / (1 - RATE))}
    error = np.sqrt(RATE / (1 - RATE) / found.size)
    assert abs(found.mean() - 1) < 4 * error
    for axis in range(3):  # no head, query or key stands out
        rest = found.mean(tuple(a for a in range(3) if a != axis))
        assert abs(rest - 1).max() < 5 * error * np.sqrt(found.shape[axis])


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 1, -1)])
def test_neighbours_are_not_correlated(key, shift):
    found = factors(key) - 1
    moved = np.roll(found, shift, (0, 1, 2))
    assert abs(np.mean(found * moved)) / found.var() < 4 / np.sqrt(found.size)


def test_another_seed_drops_others(key):
    one, other = (factors(k) > 0 for k in jax.random.split(key))
    assert np.mean(one == other) == pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.01)
    np.testing.assert_array_equal(factors(key), factors(key))


@pytest.mark.parametrize("kernel", [reference, blockwise])
def test_a_rate_of_one_is_refused(key, kernel):
    q = jnp.ones((1, 4, 1, 16))
    with pytest.raises(ValueError, match="at least 0 and below 1, not 1"):
        kernel(q, q, q, Mask(), dropout=(1, key))
