"""LLM.int8() against bitsandbytes' numbers (scripts/references/bnb_int8.py), its limits and bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.models import decoder
from research.models.families.llama import llama
from research.weights import base, int8, lora, outliers
from research.weights.formats import Codebook, Integer
from research.weights.quantized import quantize, quantized

THEIRS = load_file(Path(__file__).parent / "fixtures" / "bnb_int8.safetensors")
X, NODE = (
    jnp.asarray(THEIRS["x"]),
    quantized("k/kernel", jnp.asarray(THEIRS["weight"].T), Integer(8, "row")),
)
# Ours and theirs: 0 means "no outliers" there.
THRESHOLDS = [(6.0, "6.0"), (2.5, "2.5"), (float("inf"), "0.0")]
# bitsandbytes 0.50 multiplies by 6.200124e-05 for 1 / 127² on a CPU, of which a digit is missing.
THEIR_SQUARE = 6.200124e-05 * 127**2


def test_the_matrix_has_bitsandbytes_integers():
    steps, scale = int8.integers(NODE)
    np.testing.assert_array_equal(steps, THEIRS["weight.codes"])
    np.testing.assert_allclose(scale * 127, THEIRS["weight.scale"], rtol=1e-6)


@pytest.mark.parametrize("threshold, name", THRESHOLDS)
def test_inputs_are_split_and_rounded_like_bitsandbytes(threshold, name):
    steps, size, rest = outliers.parts(X, threshold)
    np.testing.assert_array_equal(steps, THEIRS[f"codes.{name}"])
    np.testing.assert_allclose(size[:, 0] * 127, THEIRS[f"scale.{name}"], rtol=1e-6)
    features = THEIRS[f"features.{name}"]
    assert np.flatnonzero(np.asarray(rest).any(0)).tolist() == features.tolist()
    np.testing.assert_array_equal(rest[:, features], X[:, features])
    assert len(features) == {"6.0": 2, "2.5": 20, "0.0": 0}[name]


@pytest.mark.parametrize("threshold, name", THRESHOLDS)
@pytest.mark.parametrize("x, kind", [(X, "output"), (X[:1], "output.one")])
def test_products_equal_bitsandbytes(threshold, name, x, kind):
    steps, size, rest = outliers.parts(x, threshold)
    whole, apart = int8.scaled_product(steps, size, NODE), rest @ NODE.dense()
    expected = THEIRS[f"{kind}.{name}"]
    np.testing.assert_allclose(THEIR_SQUARE * whole + apart, expected, rtol=1e-5, atol=2e-5)
    found = jax.jit(base.matmul)(x, outliers.Decomposed(NODE, threshold))
    np.testing.assert_allclose(found, whole + apart, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max() + 1e-5)


def test_at_threshold_0_nothing_and_at_infinity_all_is_rounded():
    none = base.matmul(X, outliers.Decomposed(NODE, 0.0))
    np.testing.assert_allclose(none, X @ NODE.dense(), rtol=1e-5, atol=1e-5)
    all_rounded = base.matmul(X, outliers.Decomposed(NODE, float("inf")))
    np.testing.assert_allclose(all_rounded, base.matmul(X, int8.QuantizedInputs(NODE, None)))


def test_outliers_apart_are_what_saves_the_rest_of_their_row():
    """One feature 1000 times the others takes all steps of its row."""
    x = X.at[:, 7].set(1000.0)
    exact = x @ NODE.dense()

    def error(threshold):
        return float(jnp.abs(base.matmul(x, outliers.Decomposed(NODE, threshold)) - exact).max())

    assert error(6.0) < 0.2 < 2 < error(float("inf"))


def test_either_side_of_a_table_and_the_gradient():
    table = quantize({"t": {"table": jnp.asarray(THEIRS["weight"])}}, ".*", Integer(8, "row"))
    table = outliers.add(table, ".*")["t"]["table"]
    kernel = outliers.Decomposed(NODE)
    found = base.matmul_transposed(X, table)
    np.testing.assert_allclose(found, base.matmul(X, kernel), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(base.take(table, jnp.array([3])), table.dense()[jnp.array([3])])
    g = jax.random.normal(jax.random.key(0), found.shape)
    for product, node in ((base.matmul, kernel), (base.matmul_transposed, table)):
        dx = jax.jit(jax.grad(lambda x, node=node, product=product: (product(x, node) * g).sum()))(
            X
        )
        np.testing.assert_allclose(dx, g @ NODE.dense().T, rtol=1e-5, atol=1e-5)


def test_a_decoder_under_scan_and_lora(key):
    model = decoder.Decoder(llama(50, 2, 16, 2, 2, 32, init_std=0.4, max_length=16, tied=True))
    plain = quantize(decoder.init(model, key), r".*/kernel|embed/table", Integer(8, "row"))
    params = outliers.add(plain, r".*/kernel|embed/table", 2.0)
    tokens = jax.random.randint(key, (2, 7), 0, 50)

    def logits(params):
        return jax.jit(lambda p: model.apply({"params": p}, tokens))(params)

    exact, found = logits(plain), logits(params)
    assert 1e-4 < jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact) < 0.05
    assert jax.tree.structure(outliers.remove(params)) == jax.tree.structure(plain)
    adapted = lora.add(params, r".*/down/kernel", key, rank=2)
    node = adapted["stack_0"]["block_0"]["ffn"]["down"]["kernel"]

    @jax.jit
    @jax.grad
    def grad(b):
        tree = jax.tree.map(
            lambda w: w.replace(b=b) if isinstance(w, lora.LoRA) else w,
            adapted,
            is_leaf=base.is_weight,
        )
        return jnp.square(model.apply({"params": tree}, tokens)).mean()

    assert jnp.linalg.norm(grad(node.b)) > 0
    axes = base.leaf_axes(params, decoder.axes(model))
    same = jax.tree.map(
        lambda leaf, names: leaf.ndim == len(names),
        params,
        axes,
    )
    assert all(jax.tree.leaves(same))


def test_bad_input():
    params = {"k": {"kernel": jnp.ones((16, 2))}}
    with pytest.raises(ValueError, match="at least 0, not -1"):
        outliers.add(params, ".*", -1.0)
    needed = r'k/kernel quantized to Integer\(8, "row"\)'
    with pytest.raises(ValueError, match=needed):
        outliers.add(params, ".*")
    with pytest.raises(ValueError, match=needed):
        outliers.add(quantize(params, ".*", Codebook(group=16)), ".*")
    with pytest.raises(ValueError, match="k/kernel is a LoRA already"):
        outliers.add(lora.add(params, ".*", jax.random.key(0), rank=1), ".*")
