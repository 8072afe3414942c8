"""A transposed matrix multiplies like the matrix, wherever it stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.weights import base, lora, merge
from research.weights.transposed import Transposed, transpose

MODEL = decoder.Decoder(llama(40, 2, 16, 4, 2, 24, tied=True, init_std=0.3))


@pytest.fixture
def matrix(key):
    return jax.random.normal(key, (6, 5))


@pytest.mark.parametrize("rows", [1, base.FEW_ROWS, base.FEW_ROWS + 1])
def test_it_multiplies_like_the_matrix_from_either_side(matrix, key, rows):
    w = Transposed(matrix.T)
    x, y = jax.random.normal(key, (rows, 1, 6)), jax.random.normal(key, (rows, 1, 5))
    np.testing.assert_allclose(base.matmul(x, w), x @ matrix, atol=1e-5)
    np.testing.assert_allclose(base.matmul_transposed(y, w), y @ matrix.T, atol=1e-5)
    # The plain matrix, on either side of the number of rows where its product turns around.
    np.testing.assert_allclose(base.matmul_transposed(y, matrix), y @ matrix.T, atol=1e-5)


def test_it_denotes_the_matrix_and_has_its_gradient(matrix, key):
    w, x = Transposed(matrix.T), jax.random.normal(key, (3, 6))
    np.testing.assert_array_equal(base.dense(w), matrix)
    np.testing.assert_array_equal(base.take(w, jnp.array([4, 0])), matrix[jnp.array([4, 0])])
    grad = jax.grad(lambda w: (base.matmul(x, w) ** 2).sum())
    np.testing.assert_allclose(grad(w).stored.T, grad(matrix), rtol=1e-4, atol=1e-5)


def test_axis_names_turn_with_it():
    assert Transposed(None).axes(("layers", "embed", "ffn")).stored == ("layers", "ffn", "embed")


def test_transpose_takes_every_matrix_and_the_base_of_an_adapter(key):
    params = decoder.unstack(decoder.init(MODEL, key))
    tuned = lora.add(params, r".*/q/kernel", key, rank=3, alpha=6)
    layer = tuned["stack_0"][0]
    turned = transpose(layer)
    names = dict(named_leaves(turned, is_leaf=base.is_weight))
    assert isinstance(names["block_0/attention/q/kernel"], lora.LoRA)
    assert isinstance(names["block_0/attention/q/kernel"].base, Transposed)
    assert isinstance(names["block_0/ffn/down/kernel"], Transposed)
    assert names["block_0/ffn_norm/scale"].ndim == 1
    for got, want in zip(
        jax.tree.leaves(merge(turned)), jax.tree.leaves(merge(layer)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-6)
