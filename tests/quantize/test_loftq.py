"""LoftQ against a loop in float64, and what it promises: never farther from the matrix than QLoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.quantize import loftq
from research.weights import base, lora
from research.weights.formats import Codebook, Integer
from research.weights.quantized import quantize, quantized

INT4 = Integer(4, 16)
PATH = "x/kernel"


@pytest.fixture(scope="module")
def w():
    return jax.random.normal(jax.random.key(0), (2, 32, 48))


def by_hand(w, rank, steps):
    """(Q, A B, errors) of one matrix [in, out] in groups of 16 along a column, in float64."""
    w, product, errors = np.asarray(w, np.float64), 0.0, []
    for _ in range(steps):
        groups = (w - product).T.reshape(w.shape[1], -1, 16)
        scale = np.abs(groups).max(-1, keepdims=True) / 7
        q = (np.round(groups / scale) * scale).reshape(w.shape[1], -1).T
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        product = u[:, :rank] * s[:rank] @ vt[:rank]
        errors.append(np.linalg.norm(w - q - product))
    return q, product, errors


def test_one_step_after_another_as_in_a_loop_in_float64(w):
    for steps in (1, 2, 3):
        node, a, b, errors = loftq.fit(PATH, w, 4, INT4, steps, 0.5)
        for layer in range(2):
            _, _, want = by_hand(w[layer], 4, steps)
            np.testing.assert_allclose(errors[:, layer], want, rtol=1e-4)
            q, product, _ = by_hand(w[layer], 4, int(np.argmin(want)) + 1)
            np.testing.assert_allclose(node.dense()[layer], q, atol=1e-4)
            np.testing.assert_allclose(0.5 * a[layer] @ b[layer], product, atol=1e-4)


@pytest.mark.parametrize(
    "format", [INT4, Codebook(group=16, double=True), Integer(2, 8, "integer")]
)
def test_it_is_nearer_than_the_quantized_matrix_and_keeps_the_best(w, format):
    plain = jnp.linalg.norm(w - quantized(PATH, w, format).dense(), axis=(1, 2))
    bests = []
    for steps in (1, 4):
        found = loftq.add({"x": {"kernel": w}}, PATH, jax.random.key(1), 4, format, steps, alpha=8)
        node = found["x"]["kernel"]
        assert node.scale == 2 and node.residual == (steps > 1)
        bests.append(jnp.linalg.norm(w - node.dense(), axis=(1, 2)))
        _, _, _, errors = loftq.fit(PATH, w, 4, format, steps, 2.0)
        np.testing.assert_allclose(bests[-1], errors.min(0), rtol=1e-4)
    assert (bests[0] < 0.97 * plain).all() and (bests[1] <= bests[0] * (1 + 1e-5)).all()


def test_no_step_is_qlora_and_a_whole_rank_is_the_matrix(w):
    params, key = {"x": {"kernel": w}}, jax.random.key(1)
    none = loftq.add(params, PATH, key, 4, INT4, steps=0)
    plain = lora.add(quantize(params, PATH, INT4), PATH, key, 4)
    jax.tree.map(np.testing.assert_array_equal, none, plain)
    whole = loftq.add(params, PATH, key, 32, INT4, steps=1)
    np.testing.assert_allclose(base.merge(whole)["x"]["kernel"], w, atol=1e-5)


def test_bad_input(w):
    params, key = {"x": {"kernel": w}}, jax.random.key(1)
    with pytest.raises(ValueError, match="steps of at least 0"):
        loftq.add(params, PATH, key, 4, INT4, steps=-1)
    with pytest.raises(ValueError, match="rank of at most 32"):
        loftq.add(params, PATH, key, 33, INT4)
    with pytest.raises(ValueError, match="x/kernel is a Quantized already"):
        loftq.add(quantize(params, PATH, INT4), PATH, key, 4, INT4)
    with pytest.raises(ValueError, match="what its first factors left"):
        lora.remove(loftq.add(params, PATH, key, 4, INT4, steps=2))
