"""The size of logits against numpy, and against what it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evaluate.logits import logit_scale
from research.models import decoder
from research.models.families.gpt import gpt

V = 30
MODEL = decoder.Decoder(gpt(V, 1, 16, 2, 8, tied=False, init_std=0.5))


@pytest.fixture(scope="module")
def params():
    return jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))


def batch(seed, weights):
    tokens = jax.random.randint(jax.random.key(seed), (2, 6), 0, V)
    return {"tokens": tokens, "targets": tokens, "weights": jnp.array(weights)}


def test_means_over_counted_positions_of_all_batches(params):
    """Whatever the weights are, and however unevenly batches count."""
    batches = [
        batch(1, [[0, 0.5, 0.1, 0, 0, 0.2], [0, 0, 0, 0, 0, 0]]),
        batch(2, [[1.0] * 6, [0, 0, 0, 0, 0, 3]]),
    ]
    log_z, largest = [], []
    for each in batches:
        z = np.asarray(MODEL.apply({"params": params}, each["tokens"]), np.float64)
        for row, t in np.argwhere(np.asarray(each["weights"]) != 0):
            log_z.append(np.log(sum(np.exp(value) for value in z[row, t])))
            largest.append(max(z[row, t]))
    assert len(log_z) == 10
    found = logit_scale(MODEL, params, batches)
    np.testing.assert_allclose(found.log_partition, np.mean(log_z), rtol=1e-5)
    np.testing.assert_allclose(found.largest, np.mean(largest), rtol=1e-5)


def test_equal_logits(params):
    level = params | {"head": {"kernel": jnp.zeros((16, V))}}
    found = logit_scale(MODEL, level, [batch(1, [[1.0] * 6] * 2)])
    assert found.log_partition == pytest.approx(np.log(V)) and found.largest == 0


def test_what_is_not_finite_is_seen_where_it_counts(params):
    """Token 2 is embedded as nan, and only the second row reads it."""
    broken = params | {"embed": {"table": params["embed"]["table"].at[2].set(jnp.nan)}}
    one = batch(1, [[1.0] * 6, [0.0] * 6]) | {"tokens": jnp.array([[1] * 6, [2] * 6])}
    assert np.isfinite(logit_scale(MODEL, broken, [one]).log_partition)
    whole = one | {"weights": jnp.ones((2, 6))}
    assert np.isnan(logit_scale(MODEL, broken, [whole]).log_partition)


def test_nothing_counted_is_an_error(params):
    with pytest.raises(ValueError, match="no position counts"):
        logit_scale(MODEL, params, [])
    with pytest.raises(ValueError, match="no position counts"):
        logit_scale(MODEL, params, [batch(1, [[0.0] * 6] * 2)])
