"""Label smoothing against torch.nn.CrossEntropyLoss, and by hand.

The numbers are what scripts/references/label_smoothing.py writes (torch 2.13.0, float64).
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.losses.lm import cross_entropy, fused_cross_entropy

TABLE = json.loads((Path(__file__).parent / "fixtures/label_smoothing.json").read_text())


def fused(logits, targets, weights, **terms):
    """A head that is the identity, on one row of positions."""
    row = jax.tree.map(lambda x: x[None], (logits, targets, weights))
    return fused_cross_entropy(lambda params, h: h, {}, *row, chunk=2, **terms)


@pytest.mark.parametrize("loss", [cross_entropy, fused])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3])
def test_value_and_gradient_equal_torch(loss, epsilon):
    targets = jnp.array(TABLE["targets"])
    weights = (targets != -100) / (targets != -100).sum()
    loss = partial(loss, targets=jnp.maximum(targets, 0), weights=weights, label_smoothing=epsilon)
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.array(TABLE["logits"]))
    assert float(value) == pytest.approx(TABLE[str(epsilon)]["loss"], rel=1e-6)
    np.testing.assert_allclose(gradient, TABLE[str(epsilon)]["gradient"], atol=1e-7)


def test_two_classes_by_hand():
    """Equal logits: ln 2 whatever ε; p = (3/4, 1/4), ε = 0.1: −(0.95 ln 3/4 + 0.05 ln 1/4)."""
    targets, weights = jnp.array([0]), jnp.ones(1)
    even, _ = cross_entropy(jnp.zeros((1, 2)), targets, weights, label_smoothing=0.1)
    assert float(even) == pytest.approx(np.log(2))
    logits = jnp.log(jnp.array([[3.0, 1.0]]))
    smoothed, _ = cross_entropy(logits, targets, weights, label_smoothing=0.1)
    assert float(smoothed) == pytest.approx(0.3426127, rel=1e-6)
