"""Products of int8 numbers and of rounded inputs against numpy's, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.weights import int8, lora
from research.weights.base import matmul, matmul_transposed, row_count, take
from research.weights.formats import Codebook, Integer
from research.weights.quantized import Quantized, quantize, quantized

W8 = Integer(8, "row")
# Matrices whose integers are summed, and others; the same function either way.
FORMATS = {
    "int8": W8,
    "one scale": Integer(8, "matrix"),
    "int4 by row": Integer(4, "row"),
    "int8, double": Integer(8, "row", double=True),
    "int4 in groups": Integer(4, 16),
    "int8, zero": Integer(8, "row", "integer"),
    "NF4": Codebook(group=16),
}
SUMMED = ("int8", "one scale", "int4 by row", "int8, double")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def by_hand(x, node, per="token", bits=8):
    """What it should give, in numpy and float64."""
    x, most = np.asarray(x, np.float64), 2 ** (bits - 1) - 1
    if per == "static":
        scale = float(node.scale)
    else:
        scale = np.abs(x).max(-1 if per == "token" else None, keepdims=True) / most
    steps = np.clip(np.round(np.float32(x / scale)), -most, most)
    return steps * scale @ np.asarray(node.dense(), np.float64)


@pytest.mark.parametrize("inner", [7, 576, 132_000])
def test_sums_of_integers_are_numpys(inner):
    """Random ones, and all at the extremes with one sign: the largest sum there is."""
    rng = np.random.default_rng(0)
    x, rows = (rng.integers(-127, 128, (n, inner)).astype(np.int8) for n in (3, 5))
    x[0], rows[:2] = 127, [[127], [-127]]
    found = jax.jit(int8.accumulate)(x, rows)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ rows.T.astype(np.int64))
    assert found[0, :2].tolist() == [127 * 127 * inner, -127 * 127 * inner]


def test_the_integers_of_a_matrix_are_its_values_over_their_scales():
    w = normal(0, 32, 8)
    for bits in (8, 4):
        steps, scale = int8.integers(quantized("a/kernel", w, Integer(bits, "row")))
        assert steps.dtype == jnp.int8 and steps.shape == (8, 32)
        assert jnp.abs(steps.astype(int)).max(1).tolist() == [2 ** (bits - 1) - 1] * 8
        node = quantized("a/kernel", w, Integer(bits, "row"))
        np.testing.assert_array_equal(steps * scale[:, None], node.values())


def test_a_product_by_hand():
    """Columns of largest magnitude 127 are their own integers; so is the first row of x."""
    w = jnp.array([[127.0, -2], [3, 127], [-1, 5]])
    x = jnp.array([[127.0, 1, -2], [0.254, 0.1, 0]])
    node = int8.QuantizedInputs(quantized("a/kernel", w, W8), None)
    found = matmul(x, node)
    # The second row's step is 0.002: 127 and 50.
    second = [0.002 * (127 * 127 + 50 * 3), 0.002 * (127 * -2 + 50 * 127)]
    expected = [[127 * 127 + 3 + 2, 127 * -2 + 127 - 10], second]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    whole = matmul(x, node.replace(per="tensor"))
    np.testing.assert_allclose(whole, [expected[0], [0, 0]], rtol=1e-6)
    assert not matmul(jnp.zeros((2, 3)), node).any()


def test_a_static_scale_clips_and_does_not_look_at_the_inputs():
    w = jnp.eye(3) * 127
    params = {"a": {"kernel": quantized("a/kernel", w, Integer(8, "matrix"))}}
    node = int8.add(params, "a/kernel", "static", largest={"a/kernel": jnp.float32(12.7)})
    x = jnp.array([[1.04, 100.0, -100.0]])
    np.testing.assert_allclose(
        matmul(x, node["a"]["kernel"]), [[127 * 1.0, 127 * 12.7, -127 * 12.7]], rtol=1e-6
    )


def test_nearly_nothing_has_the_smallest_step():
    """So that a row of tiny numbers is rounded to nothing and not to its largest."""
    node = int8.QuantizedInputs(quantized("a/kernel", jnp.eye(2), W8), None)
    found = matmul(jnp.array([[1e-9, 0], [1e-5, 0]]), node)
    np.testing.assert_allclose(found, [[0, 0], [1e-5, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "name, per",
    [(name, "token") for name in FORMATS]
    + [("int8", "tensor"), ("int8", "static"), ("int4 in groups", "static")],
)
def test_every_matrix_gives_the_product_of_rounded_inputs(name, per):
    table, kernel = normal(1, 40, 32), normal(2, 32, 48)
    params = quantize({"t": {"table": table}, "k": {"kernel": kernel}}, r".*", FORMATS[name])
    largest = {"t/table": 1.5, "k/kernel": 1.5} if per == "static" else None
    done = int8.add(params, ".*", per, largest=largest)
    table, kernel = done["t"]["table"], done["k"]["kernel"]
    assert int8.sums_integers(kernel.base, False) == (name in SUMMED)
    x = normal(3, 6, 32) * jnp.arange(1.0, 7)[:, None]
    np.testing.assert_allclose(matmul(x, kernel), by_hand(x, kernel, per), rtol=2e-5, atol=2e-4)
    states = normal(4, 6, 32)
    expected = by_hand(states, table.replace(base=table.dense().T), per)
    np.testing.assert_allclose(matmul_transposed(states, table), expected, rtol=2e-5, atol=2e-4)
    # The other directions, where scales lie along the sum.
    x, turned = normal(5, 6, 40), normal(6, 6, 48)
    np.testing.assert_allclose(matmul(x, table), by_hand(x, table, per), rtol=2e-5, atol=2e-4)
    expected = by_hand(turned, kernel.replace(base=kernel.dense().T), per)
    np.testing.assert_allclose(matmul_transposed(turned, kernel), expected, rtol=2e-5, atol=2e-4)
    np.testing.assert_array_equal(take(table, jnp.array([3, 0])), table.dense()[jnp.array([3, 0])])
    assert row_count(table) == 40


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_of_other_widths_and_of_a_dense_matrix(bits):
    x, w = normal(0, 5, 16), normal(1, 16, 8)
    node = int8.add({"k": {"kernel": w}}, ".*", bits=bits)["k"]["kernel"]
    steps, _ = node.rounded(x)
    assert jnp.unique(jnp.abs(steps)).max() == 2 ** (bits - 1) - 1
    np.testing.assert_allclose(matmul(x, node), by_hand(x, node, bits=bits), rtol=1e-5, atol=1e-5)
    half = matmul(x.astype(jnp.bfloat16), node)
    assert half.dtype == jnp.bfloat16


def test_one_scale_a_row_is_finer_than_one_for_all():
    """Rows of very different size: what token-wise scales are for."""
    x = normal(0, 64, 32) * jnp.logspace(-2, 0, 64)[:, None]
    node = int8.QuantizedInputs(quantized("a/kernel", normal(1, 32, 16), W8), None)
    exact = x @ node.dense()

    def error(per):
        rest = matmul(x, node.replace(per=per)) - exact
        return float((jnp.linalg.norm(rest, axis=1) / jnp.linalg.norm(exact, axis=1)).mean())

    assert error("token") < 0.01 < 0.05 < error("tensor")


@pytest.mark.parametrize("name", ["int8", "int4 in groups"])
def test_the_gradient_is_that_of_the_float_form(name):
    """g Wᵀ for the inputs; for what the matrix is made of, that of the product of rounded inputs."""
    x, g, base = (
        normal(0, 5, 32),
        normal(1, 5, 48),
        quantized("k/kernel", normal(2, 32, 48), FORMATS[name]),
    )
    for per, scale in (("token", None), ("static", jnp.float32(0.01))):
        node = int8.QuantizedInputs(base, scale, 8, per)

        def product(x, sizes, node=node):
            return (matmul(x, node.replace(base=node.base.replace(scale=sizes))) * g).sum()

        dx, sizes = jax.jit(jax.grad(product, (0, 1)))(x, base.scale)
        np.testing.assert_allclose(dx, g @ base.dense().T, rtol=1e-5, atol=1e-5)
        steps, size = node.rounded(x)

        def plain(sizes, steps=steps, size=size):
            return ((steps * size) @ base.replace(scale=sizes).dense() * g).sum()

        np.testing.assert_allclose(sizes, jax.grad(plain)(base.scale), rtol=1e-4, atol=1e-4)


def test_bad_input():
    params = {"k": {"kernel": normal(0, 16, 8)}, "norm": {"scale": jnp.ones(4)}}
    for options, said in [
        ({"per": "row"}, "'token', 'tensor' or 'static', not 'row'"),
        ({"bits": 9}, "2 to 8 bits, not 9"),
        ({"per": "static"}, "per='static' needs `largest`"),
        ({"largest": {"k/kernel": 1.0}}, "per='static' needs `largest` .* per is 'token'"),
        ({"per": "static", "largest": {}}, "`largest` has no magnitude for k/kernel"),
        ({"per": "static", "largest": {"k/kernel": [1.0]}}, r"k/kernel needs .* of shape \(\), .* \(1,\)"),
        ({"per": "static", "largest": {"k/kernel": 0.0}}, "k/kernel has .* not a positive number"),
        ({"per": "static", "largest": {"k/kernel": np.nan}}, "k/kernel has .* not a positive number"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            int8.add(params, "k/kernel", **options)
    with pytest.raises(ValueError, match=r"not norm/scale \(4,\)"):
        int8.add(params, "norm/scale")
    adapted = lora.add(params, "k/kernel", jax.random.key(0), rank=2)
    with pytest.raises(ValueError, match="k/kernel is a LoRA already: add it before adapters"):
        int8.add(adapted, "k/kernel")
    with pytest.raises(ValueError, match="k/kernel is a QuantizedInputs already"):
        int8.add(int8.add(params, "k/kernel"), "k/kernel")
    codes = jax.ShapeDtypeStruct((1, int8.LONGEST + 1), jnp.uint8)
    long = Quantized(codes, jax.ShapeDtypeStruct((1, 1), jnp.float32), None, W8, True)
    with pytest.raises(
        ValueError, match=f"sums of {int8.LONGEST + 1} products do not fit in int32"
    ):
        int8.require_base("quantization of inputs", "k/kernel", long)
