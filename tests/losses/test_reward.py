"""Losses of reward models by hand and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evaluate.comparisons import bradley_terry
from research.losses.reward import pairwise, ranked


def test_pairs_by_hand():
    chosen, rejected = jnp.array([2.0, 0.0]), jnp.array([0.5, 1.0])
    wanted = [np.log1p(np.exp(-1.5)), np.log1p(np.exp(1.0))]
    np.testing.assert_allclose(pairwise(chosen, rejected), wanted, rtol=1e-6)
    np.testing.assert_allclose(pairwise(chosen, rejected), -bradley_terry(chosen, rejected))
    np.testing.assert_allclose(
        pairwise(chosen, rejected, 0.5)[0], np.log1p(np.exp(-1.0)), rtol=1e-6
    )
    moved = pairwise(chosen, rejected, centre=0.1) - pairwise(chosen, rejected)
    np.testing.assert_allclose(moved, [0.625, 0.1], rtol=1e-5)


def test_only_differences_count_without_centring():
    chosen, rejected = jnp.array([2.0]), jnp.array([0.5])
    np.testing.assert_allclose(
        pairwise(chosen + 7, rejected + 7), pairwise(chosen, rejected), rtol=1e-5
    )
    assert pairwise(chosen + 7, rejected + 7, centre=0.01) > pairwise(chosen, rejected, centre=0.01)


def test_an_order_is_all_of_its_pairs():
    scores = jnp.array([[1.0, 0.2, -0.5], [0.0, 1.0, 2.0]])
    pairs = [pairwise(scores[:, i], scores[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(ranked(scores), np.mean(pairs, axis=0), rtol=1e-6)
    np.testing.assert_allclose(ranked(scores[:, :2]), pairs[0], rtol=1e-6)
    with pytest.raises(ValueError, match="2 answers or more, not 1"):
        ranked(scores[:, :1])


def test_extreme_scores_are_finite():
    value, grads = jax.value_and_grad(lambda x: pairwise(x, -x).sum())(jnp.array([-1e4, 1e4]))
    assert np.isfinite(value) and np.isfinite(grads).all()
