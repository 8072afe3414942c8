"""Dropout of embeddings, residual sums and attention probabilities."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import attention_weights, reference
from research.kernels.blockwise import blockwise
from research.kernels.dropout import kept, seed_of
from research.kernels.mask import Mask
from research.models import decoder
from research.models.families.gpt import gpt
from research.models.layers import dropout

init = jax.jit(decoder.init, static_argnums=0)

RATE = 0.3
RATES = {"dropout": RATE, "residual_dropout": RATE, "attention_dropout": RATE}
NONE = dict.fromkeys(RATES, 0.0)
FORMS = {
    "scanned": {},
    "loop": {"scan": False},
    "rematerialised": {"remat": "full"},
    "rematerialised loop": {"remat": "full", "scan": False},
}


def small(rates, **more):
    return decoder.Decoder(gpt(50, 3, 24, 3, 16, init_std=0.2, **rates, **more))


@pytest.fixture(scope="module")
def params():
    return init(small(NONE), jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 11), 0, 50)


@partial(jax.jit, static_argnames="model")
def run(model, params, tokens, key=None):
    rngs = None if key is None else {"dropout": key}
    return model.apply({"params": params}, tokens, rngs=rngs)


def test_no_rate_or_no_rng_changes_nothing(params, tokens):
    plain = run(small(NONE), params, tokens)
    np.testing.assert_array_equal(run(small(RATES), params, tokens), plain)
    np.testing.assert_array_equal(run(small(NONE), params, tokens, jax.random.key(3)), plain)


@pytest.mark.parametrize("only", RATES)
def test_every_kind_acts_by_itself(params, tokens, only):
    model = small({**NONE, only: RATE})
    first, again, other = (run(model, params, tokens, jax.random.key(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - run(model, params, tokens)).max() > 0.1


@pytest.mark.parametrize("form", list(FORMS)[1:])
def test_one_key_draws_the_same_in_every_form(params, tokens, form):
    """Values and gradients: what is rebuilt for the backward pass is drawn as before."""

    def loss(params, model):
        return (run(model, params, tokens, jax.random.key(3)) ** 2).mean()

    want = jax.value_and_grad(loss)(params, small(RATES))
    got = jax.value_and_grad(loss)(params, small(RATES, **FORMS[form]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


def counting(rates, layers=3, **more):
    """A model of zero matrices whose every feed-forward layer adds 1 to each feature."""
    model = small(rates, final_norm=None, **more)
    zeros = jax.tree.map(jnp.zeros_like, init(model, jax.random.key(0)))
    zeros["stack_0"]["block_0"]["ffn"]["down"]["bias"] += 1
    return model, zeros


@pytest.mark.parametrize("form", FORMS)
def test_layers_draw_apart(form):
    """Three layers add 0 or 1/(1-p) to each of 24 * 22 features: how many did is binomial."""
    model, zeros = counting({**NONE, "residual_dropout": RATE}, **FORMS[form])
    states = model.apply(
        {"params": zeros},
        jnp.zeros((2, 11), jnp.int32),
        rngs={"dropout": jax.random.key(5)},
        method="hidden",
    )
    added = np.asarray(states) * (1 - RATE)
    np.testing.assert_allclose(added, added.round(), atol=1e-5)
    shares = np.bincount(added.round().astype(int).ravel(), minlength=4) / added.size
    p, q = RATE, 1 - RATE
    np.testing.assert_allclose(shares, [p**3, 3 * q * p**2, 3 * q**2 * p, q**3], atol=0.07)


def test_the_expectation_is_the_model_without():
    """4000 draws of one layer's embedding and residual dropout; the standard error is 0.01."""
    model, zeros = counting({**NONE, "dropout": RATE, "residual_dropout": RATE})
    zeros["embed"]["table"] += 1
    draw = partial(model.apply, {"params": zeros}, jnp.zeros((1, 1), jnp.int32), method="hidden")
    keys = jax.random.split(jax.random.key(6), 4000)
    states = jax.vmap(lambda key: draw(rngs={"dropout": key}))(keys)
    assert draw().ravel()[0] == 4  # the embedding and three layers
    np.testing.assert_allclose(states.mean(0).ravel(), 4, atol=0.1)
    # Four independent entries, each 0 or 1/(1-p) with variance p / (1-p).
    assert np.var(states) == pytest.approx(4 * RATE / (1 - RATE), rel=0.03)


def test_attention_probabilities_by_hand(key):
    """The rows of the weights with entries struck out; their mean over draws is as without."""
    q, k, v = jax.random.normal(key, (3, 1, 6, 2, 4))
    mask = Mask(window=4)
    weights = attention_weights(q, k, mask)
    heads, row, column = jnp.arange(2)[:, None, None], jnp.arange(6)[:, None], jnp.arange(6)
    factor = kept(seed_of(key), heads, row, column, RATE)
    assert sorted(set(np.unique(factor).tolist())) == [0, pytest.approx(1 / (1 - RATE))]
    want = jnp.einsum("bnts,bsnh->btnh", weights * factor, v)
    got = reference(q, k, v, mask, dropout=(RATE, key))
    np.testing.assert_allclose(got, want, atol=1e-6)
    keys = jax.random.split(key, 4000)
    mean = jax.vmap(lambda one: reference(q, k, v, mask, dropout=(RATE, one)))(keys).mean(0)
    np.testing.assert_allclose(mean, reference(q, k, v, mask), atol=0.06)


def test_kernels_that_cannot_are_refused(params, tokens):
    def plain(q, k, v, mask, scale=None):
        return reference(q, k, v, mask, scale)

    model = small(RATES, attend=plain)
    run(model, params, tokens)  # without an rng nothing is dropped
    with pytest.raises(ValueError, match=r"kernel plain has no dropout: leave Attention.dropout"):
        run(model, params, tokens, jax.random.key(0))
    without = small({**RATES, "attention_dropout": 0.0}, attend=plain)
    run(without, params, tokens, jax.random.key(0))


def test_every_kernel_drops_the_same(params, tokens):
    logits = [
        run(small(RATES, attend=attend), params, tokens, jax.random.key(3))
        for attend in (reference, blockwise)
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_bfloat16_stays_bfloat16(params, tokens):
    model = decoder.Decoder(dataclasses.replace(small(RATES).config, dtype=jnp.bfloat16))
    states = model.apply(
        {"params": params}, tokens, rngs={"dropout": jax.random.key(0)}, method="hidden"
    )
    assert states.dtype == jnp.bfloat16 and dropout(model, states, 0.0) is states
