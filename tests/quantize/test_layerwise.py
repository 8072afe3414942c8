"""A model walked layer by layer is the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.adapters.prefixed import Prefixed
from research.models import decoder
from research.models.families.llama import llama
from research.quantize import layerwise

CONFIG = llama(50, 2, 32, 2, 2, 64, head_size=16, max_length=64, init_std=0.4)
MODEL = decoder.Decoder(CONFIG)
Q = "stack_0/block_0/attention/q/kernel"


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def windows():
    return np.asarray(jax.random.randint(jax.random.key(1), (8, 24), 0, 50))


def test_layers_in_turn_are_the_model(params, windows):
    met = []

    def keep(layer, own, states, teacher):
        met.append((layer, own, states, teacher))
        return own

    same = layerwise.walk(MODEL, params, windows, keep, batch_size=3, with_teacher=True)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert [str(layer) for layer, *_ in met] == ["stack_0/block_0[0]", "stack_0/block_0[1]"]
    layer, own, states, teacher = met[-1]
    assert [len(x) for x, _ in states] == [3, 3, 2]
    jax.tree.map(np.testing.assert_array_equal, states, teacher)
    last = jnp.concatenate([x for x, _ in layerwise.run(layer, own, states)])
    rms = last / np.sqrt(np.square(last).mean(-1, keepdims=True) + CONFIG.final_norm.eps)
    whole = MODEL.apply({"params": params}, windows, method="hidden")
    np.testing.assert_allclose(rms, whole, rtol=1e-4, atol=1e-5)


def test_layers_that_are_apart_stay_apart(params, windows):
    apart = decoder.unstack(params)
    same = layerwise.walk(MODEL, apart, windows, lambda layer, own, *_: own, batch_size=8)
    jax.tree.map(np.testing.assert_array_equal, same, apart)
    assert layerwise.require_inside(MODEL, apart, Q) == [Q]


def test_bad_input(params, windows):
    def keep(layer, own, *_):
        return own

    with pytest.raises(ValueError, match="a Prefixed has a prefix"):
        layerwise.walk(Prefixed(CONFIG, 2), params, windows, keep)
    with pytest.raises(ValueError, match="at least one window"):
        layerwise.walk(MODEL, params, windows[:0], keep)
    with pytest.raises(ValueError, match=r"only matrices of layers, not \['head/kernel'\]"):
        layerwise.require_inside(MODEL, params, r".*/kernel")
