"""NEFTune: the noise's bound and variance, and where it must not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import decoder
from research.models.families.llama import llama
from research.paths import RuleError, named_leaves
from research.weights import base, lora, merge, noisy

MODEL = decoder.Decoder(llama(40, 2, 16, 4, 2, 24, tied=True, init_std=0.3))
TOKENS = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)


@jax.jit
def hidden(params, **more):
    return MODEL.apply({"params": params}, TOKENS, method="hidden", **more)


@pytest.fixture
def params(key):
    return decoder.init(MODEL, key)


@pytest.mark.parametrize("length", [None, 100])
def test_noise_is_uniform_up_to_alpha_over_the_root_of_t_d(key, length):
    """Var U(-s, s) = s² / 3."""
    table = noisy.Noisy(jnp.ones((8, 50)), 5.0, length)
    ids = jnp.zeros((200, 40), jnp.int32)
    noise = np.asarray(base.take(table, ids, base.Call(dropout=key))) - 1
    size = 5 / np.sqrt((length or 40) * 50)
    assert 0.999 * size < np.abs(noise).max() <= size * 1.0001
    assert abs(noise.mean()) < 0.01 * size
    np.testing.assert_allclose(noise.var(), size**2 / 3, rtol=0.01)


def test_noise_is_there_in_training_alone_and_never_in_a_tied_head(params, key):
    tuned = noisy.add(params, alpha=8)
    np.testing.assert_array_equal(hidden(tuned), hidden(params))
    rngs = {"dropout": key}
    assert np.abs(hidden(tuned, rngs=rngs) - hidden(params)).max() > 1e-3
    np.testing.assert_array_equal(hidden(tuned, rngs=rngs), hidden(tuned, rngs=rngs))
    silent = noisy.add(params, alpha=0)
    np.testing.assert_array_equal(hidden(silent, rngs=rngs), hidden(params))
    x = jax.random.normal(key, (3, 16))
    head = {"embed": tuned["embed"]}
    got = MODEL.apply({"params": head}, x, method="project", rngs=rngs)
    np.testing.assert_array_equal(got, MODEL.apply({"params": params}, x, method="project"))


def test_the_table_trains_and_merges_away(params, key):
    tuned = noisy.add(params)
    assert "embed/table/base" in dict(named_leaves(tuned))
    grad = jax.grad(lambda p: (hidden(p, rngs={"dropout": key}) ** 2).mean())(tuned)
    assert np.any(grad["embed"]["table"].base)
    for plain in (noisy.remove(tuned), merge(tuned)):
        jax.tree.map(np.testing.assert_array_equal, plain, params)
    axes = base.leaf_axes(tuned, decoder.axes(MODEL))
    assert axes["embed"]["table"].base == ("vocab", "embed")


def test_it_stands_on_a_lora(params, key):
    tuned = noisy.add(lora.add(params, r"embed/table", key, rank=2))
    assert np.abs(hidden(tuned, rngs={"dropout": key}) - hidden(params)).max() > 1e-3
    np.testing.assert_array_equal(hidden(tuned), hidden(params))


def test_refusals(params):
    with pytest.raises(RuleError, match="matches none"):
        noisy.add(params, r"embedding/table")
    with pytest.raises(ValueError, match=r"embedding tables.*final_norm/scale"):
        noisy.add(params, r"final_norm/scale")
    with pytest.raises(ValueError, match="alpha >= 0"):
        noisy.add(params, alpha=-1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        noisy.add(params, length=0)
