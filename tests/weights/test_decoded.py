"""Packed codes as numbers: the fast way against unpacking first, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.codes.packing import unpack
from research.codes.tables import look_up
from research.weights import base
from research.weights.formats import Codebook, Float8, Integer, decoded
from research.weights.quantized import encode

FORMATS = {
    "NF4": Codebook(group=16),
    "FP4": Codebook("FP4", 8),
    "int4": Integer(4, 16),
    "int4, zero": Integer(4, 12, "integer"),
    "int4, groups of an odd number": Integer(4, 3, "minimum"),
    "int4 by matrix": Integer(4, "matrix"),
    "int2, minimum": Integer(2, 8, "minimum"),
    "int3 by row": Integer(3, "row"),
    "int3, two groups in a word": Integer(3, 4, "minimum"),
    "int8": Integer(8, 16),
    "e4m3": Float8(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_codes_unpacked_first(name):
    format = FORMATS[name]
    node = encode(jax.random.normal(jax.random.key(0), (2, 5, 48)), format, True)
    scale, zero = node.scale.astype(jnp.float16), node.zero
    codes = unpack(node.codes, format.bits)
    expected = format.values(codes, scale.astype(jnp.float32), zero)
    np.testing.assert_array_equal(decoded(node.codes, scale, zero, format), expected)
    assert expected.shape == (2, 5, 48) and expected.dtype == jnp.float32


@pytest.mark.parametrize("name", ["NF4", "E2M1", "E3M0", "FP4"])
def test_entries_chosen_bit_by_bit_are_those_of_the_table(name):
    codes = np.arange(16, dtype=np.uint8).reshape(2, 8)
    scale = jax.random.uniform(jax.random.key(3), (2, 4), minval=0.01)
    found = jax.jit(Codebook(name, 2).values)(codes, scale, None)
    expected = look_up(codes, name) * np.repeat(scale, 2, axis=1)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, base.FEW_ROWS + 1])
def test_products_and_gradients_of_few_and_many_rows_are_those_of_the_dense_matrix(
    rows, transposed
):
    w = encode(jax.random.normal(jax.random.key(1), (24, 32)), Codebook(group=16), transposed)
    for product, width in ((base.matmul, -2), (base.matmul_transposed, -1)):
        x = jax.random.normal(jax.random.key(2), (rows, w.dense().shape[width]))
        both = [
            jax.value_and_grad(lambda x, m=m, f=product: (f(x, m) ** 2).sum())(x)
            for m in (w, w.dense())
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), *both)
