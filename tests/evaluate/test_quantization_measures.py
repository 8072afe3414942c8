"""How far a model is from another, against whole logits, a layer by hand, and numbers on paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evaluate import quantization
from research.models import decoder
from research.models.families.llama import llama
from research.paths import RuleError
from research.weights import quantized
from research.weights.formats import Integer

CONFIG = llama(50, 2, 24, 6, 2, 32, head_size=8, max_length=64, init_std=0.4)
MODEL = decoder.Decoder(CONFIG)
LAYER_STATES = jax.jit(quantization.layer_states, static_argnums=0)
Q = "stack_0/block_0/attention/q/kernel"


@pytest.fixture(scope="module")
def params():
    small = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
    return jax.tree.map(lambda w: 5 * w, small)


@pytest.fixture(scope="module")
def few_bits(params):
    return quantized.quantize(params, r".*/kernel", Integer(3, group=8))


@pytest.fixture(scope="module")
def windows():
    return np.asarray(jax.random.randint(jax.random.key(1), (4, 12), 0, 50))


def test_a_comparison_against_whole_logits(params, few_bits, windows):
    found = quantization.compare(MODEL, params, few_bits, windows, batch_size=2, chunk=4)
    p, q = (
        np.asarray(jax.nn.log_softmax(MODEL.apply({"params": each}, windows)), np.float64)[:, :-1]
        for each in (params, few_bits)
    )
    targets = windows[:, 1:, None]
    expected = {
        "divergence": (np.exp(p) * (p - q)).sum(-1),
        "full": -np.take_along_axis(p, targets, -1)[..., 0],
        "nll": -np.take_along_axis(q, targets, -1)[..., 0],
        "agreement": p.argmax(-1) == q.argmax(-1),
    }
    assert expected["divergence"].mean() > 0.01 and 0 < expected["agreement"].mean() < 1
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values.mean(-1), atol=1e-5)


def test_a_model_is_not_far_from_itself(params, windows):
    found = quantization.compare(MODEL, params, params, windows)
    np.testing.assert_allclose(found.divergence, 0, atol=1e-6)
    np.testing.assert_array_equal(found.full, found.nll)
    np.testing.assert_array_equal(found.agreement, 1)


def test_one_logit_by_hand():
    """Two tokens and a tied table: p = (3/4, 1/4), q = (1/2, 1/2)."""

    class Hand:
        def apply(self, variables, x, method):
            bias = variables["params"]["embed"]
            return jnp.zeros((*x.shape, 1)) if method == "hidden" else x + bias

    full, even = {"embed": jnp.log(jnp.array([3.0, 1.0]))}, {"embed": jnp.zeros(2)}
    found = quantization.compare(Hand(), full, even, np.array([[0, 0, 1]]))
    kl = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    np.testing.assert_allclose(found.divergence, [kl], rtol=1e-6)
    np.testing.assert_allclose(found.full, [-(np.log(0.75) + np.log(0.25)) / 2], rtol=1e-6)
    np.testing.assert_allclose(found.nll, [np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(found.agreement, [1])


def test_errors_of_matrices_by_hand():
    full = {"a": {"kernel": jnp.array([[[3.0, 0], [0, 4]], [[1, 1], [1, 1]]])}, "b": jnp.ones(2)}
    other = {"a": {"kernel": jnp.array([[[3.0, 0], [0, 3]], [[1, 1], [1, 1]]])}, "b": jnp.ones(2)}
    found = quantization.matrix_errors(full, other, r"a/kernel")
    np.testing.assert_allclose(found["a/kernel"], [1 / 5, 0], rtol=1e-6)
    with pytest.raises(RuleError, match="matches none"):
        quantization.matrix_errors(full, other, "c")
    with pytest.raises(ValueError, match="only one of the two models has b"):
        quantization.matrix_errors(full, {"a": other["a"]}, "a/kernel")


def test_errors_of_a_quantized_matrix_are_its_dense_forms(params, few_bits):
    found = quantization.matrix_errors(params, few_bits, Q)[Q]
    before = np.asarray(params["stack_0"]["block_0"]["attention"]["q"]["kernel"])
    after = np.asarray(few_bits["stack_0"]["block_0"]["attention"]["q"]["kernel"].dense())
    for n in range(2):
        expected = np.linalg.norm(after[n] - before[n]) / np.linalg.norm(before[n])
        np.testing.assert_allclose(found[n], expected, rtol=1e-5)


def test_states_after_a_layer_are_those_of_a_model_that_ends_there(params, windows):
    states = LAYER_STATES(MODEL, params, windows)
    assert states.shape == (2, 4, 12, 24)
    (stack,) = CONFIG.stacks
    stacks = (dataclasses.replace(stack, count=1),)
    short = decoder.Decoder(dataclasses.replace(CONFIG, stacks=stacks, final_norm=None))
    kept = {"embed": params["embed"], "head": params["head"]}
    kept["stack_0"] = jax.tree.map(lambda w: w[:1], params["stack_0"])
    expected = short.apply({"params": kept}, windows, method="hidden")
    np.testing.assert_allclose(states[0], expected, rtol=1e-4, atol=1e-4)


def test_errors_begin_where_the_change_is(params, windows):
    def change(w):
        return w.at[1].multiply(1.1)

    block = params["stack_0"]["block_0"]
    ffn = {**block["ffn"], "down": jax.tree.map(change, block["ffn"]["down"])}
    changed = {**params, "stack_0": {"block_0": {**block, "ffn": ffn}}}
    found = quantization.state_errors(MODEL, params, changed, windows, batch_size=2)
    assert found.shape == (2,) and found[0] == 0 and found[1] > 1e-3
    states = [np.asarray(LAYER_STATES(MODEL, p, windows)) for p in (params, changed)]
    norms = np.linalg.norm(states[1] - states[0], axis=-1) / np.linalg.norm(states[0], axis=-1)
    np.testing.assert_allclose(found, norms.mean(axis=(1, 2)), rtol=1e-4)


def test_outliers_and_standard_errors_by_hand():
    np.testing.assert_allclose(quantization.outliers([[1, 2, 3, 10, 2], [4, 4, 4, 4, 4]]), [5, 1])
    np.testing.assert_allclose(quantization.standard_error(np.array([1.0, 2, 3])), 1 / 3**0.5)


def test_bad_input(params):
    with pytest.raises(ValueError, match=r"T >= 2; got \(0, 4\)"):
        quantization.compare(MODEL, params, params, np.zeros((0, 4), np.int32))
    with pytest.raises(ValueError, match=r"got \(3, 1\)"):
        quantization.compare(MODEL, params, params, np.zeros((3, 1), np.int32))
    with pytest.raises(ValueError, match="two values or more, not 1"):
        quantization.standard_error(np.ones(1))
