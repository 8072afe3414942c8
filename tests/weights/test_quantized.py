"""Quantized matrices against formulas written down again, and as Weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import decoder
from research.models.families.llama import llama
from research.weights import base, double, lora
from research.weights.formats import Codebook, Float8, Integer
from research.weights.quantized import bits_per_parameter, quantize, quantized

FORMATS = {
    "NF4": Codebook(group=16),
    "NF4 double": Codebook(group=16, double=True),
    "FP4": Codebook("FP4", 16),
    "int4": Integer(4, 16),
    "int4, zero": Integer(4, 16, "integer"),
    "int3, minimum": Integer(3, 8, "minimum"),
    "int2, zero, double": Integer(2, 16, "integer", double=True),
    "int8 by row": Integer(8, "row"),
    "int8 by matrix": Integer(8, "matrix"),
    "e4m3": Float8(),
    "e5m2 by matrix": Float8("e5m2", "matrix"),
}


@pytest.fixture(scope="module")
def params(request):
    one, two = jax.random.split(jax.random.key(0))
    kernel = jax.random.normal(one, (3, 32, 48))
    return {"layer": {"kernel": kernel}, "embed": {"table": jax.random.normal(two, (40, 16))}}


@pytest.mark.parametrize(
    "format, error, bits",
    [
        (Codebook(), 0.0921, 4.5),
        (Codebook("E2M1"), 0.1057, 4.5),
        (Integer(), 0.1077, 4.5),
        (Codebook("FP4"), 0.1221, 4.5),
        (Codebook("E3M0"), 0.188, 4.5),
        (Integer(zero_point="minimum"), 0.0897, 5.0),
        (Codebook(double=True), 0.0921, 4 + 0.127),
    ],
)
def test_the_error_of_normal_numbers_and_what_they_take(format, error, bits):
    """RMSE of 1M standard normal numbers in groups of 64; the numbers were found with PyTorch. Twelve
    draws of so many differ from each other by 1e-4 (standard deviation), in E3M0 by 2e-4."""
    w = jax.random.normal(jax.random.key(1), (1024, 1024))
    node = quantized("a/kernel", w, format)
    found = jnp.sqrt(jnp.square(node.dense() - w).mean())
    np.testing.assert_allclose(found, error, rtol=0, atol=3e-4)
    np.testing.assert_allclose(bits_per_parameter({"a": node}), bits, atol=8e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_mean_what_was_rounded_within_half_a_step(params, name):
    format = FORMATS[name]
    node = quantized("a/kernel", params["layer"]["kernel"], format)
    rows = params["layer"]["kernel"].mT
    found = jnp.abs(node.values() - rows)
    if isinstance(format, Integer) and not format.double:
        scale = jnp.repeat(node.scale, rows.shape[-1] // node.scale.shape[-1], axis=-1)
        assert (found <= 0.5001 * scale).all()
    assert found.max() < 0.35 * jnp.abs(rows).max() * (2 if "2" in name else 1)
    twice = quantized("a/kernel", node.dense(), format)
    if not format.double and "zero" not in name:
        np.testing.assert_allclose(twice.values(), node.values(), rtol=1e-5, atol=1e-6)


def test_integers_by_hand():
    rows = jnp.array([[-7.0, 3.5, 0.4, 1.0]])
    symmetric = quantized("a/kernel", rows.T, Integer(4, 4))
    assert symmetric.values().tolist() == [[-7, 4, 0, 1]]
    rows = jnp.array([[-5.0, 10.0, 0.4, 1.6]])
    asymmetric = quantized("a/kernel", rows.T, Integer(4, 4, "integer"))
    assert asymmetric.zero.tolist() == [[5]] and asymmetric.values().tolist() == [[-5, 10, 0, 2]]
    rows = jnp.array([[2.0, 5.0, 3.2, 3.9]])
    from_least = quantized("a/kernel", rows.T, Integer(2, 4, "minimum"))
    assert from_least.values().tolist() == [[2, 5, 3, 4]]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_nothing_of_nearly_nothing_and_of_one_number(name):
    """Numbers that are too small for float32's exponent count as zeros."""
    w = jnp.stack(
        [jnp.zeros(32), jnp.full(32, 1e-39), jnp.full(32, -0.7), jnp.linspace(0.4, 1, 32)]
    )
    format = FORMATS[name]
    found = quantized("a/kernel", w.T, format).values()
    assert jnp.isfinite(found).all() and not found[:2].any()
    if format.group != "matrix" and not format.double:
        np.testing.assert_allclose(found[2], w[2], rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_tables_and_heads_tied_and_not(name):
    """What a decoder does before its layers and after them."""
    tokens, states = jnp.array([[3, 0], [39, 3]]), jax.random.normal(jax.random.key(4), (2, 2, 16))

    @partial(jax.jit, static_argnums=0)
    def ends(model, params):
        before, *_ = model.apply({"params": params}, tokens, method="enter")
        return before, model.apply({"params": params}, states, method="project")

    for tied in (True, False):
        model = decoder.Decoder(llama(40, 1, 16, 2, 2, 16, tied=tied, init_std=0.5))
        params = quantize(decoder.init(model, jax.random.key(5)), r"(embed|head)/.*", FORMATS[name])
        for found, expected in zip(
            ends(model, params), ends(model, base.merge(params)), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_groups_are_of_a_column_of_a_kernel_and_a_row_of_a_table(params):
    """So that the largest of each group is exact, and the groups do not see each other."""
    found = quantize(params, r".*", Codebook(group=16))
    kernel, table = found["layer"]["kernel"], found["embed"]["table"]
    assert kernel.codes.shape == (3, 48, 16) and kernel.scale.shape == (3, 48, 2)
    columns = np.abs(params["layer"]["kernel"]).reshape(3, 2, 16, 48).max(2)
    np.testing.assert_array_equal(kernel.scale, columns.swapaxes(1, 2))
    rows = np.abs(params["embed"]["table"]).max(1)
    np.testing.assert_array_equal(table.scale[:, 0], rows)


@pytest.mark.parametrize("name", FORMATS)
def test_every_use_of_the_matrix_is_that_of_the_dense_one(params, name):
    found = quantize(params, r".*", FORMATS[name])
    node = jax.tree.map(lambda x: x[1], found["layer"]["kernel"])
    x = jax.random.normal(jax.random.key(2), (5, 32))
    np.testing.assert_allclose(base.matmul(x, node), x @ node.dense(), rtol=1e-5, atol=1e-5)
    table, ids = found["embed"]["table"], jnp.array([[3, 0], [39, 3]])
    np.testing.assert_array_equal(base.take(table, ids), table.dense()[ids])
    states = jax.random.normal(jax.random.key(3), (5, 16))
    np.testing.assert_allclose(
        base.matmul_transposed(states, table), states @ table.dense().T, rtol=1e-5, atol=1e-5
    )
    assert base.row_count(table) == 40
    np.testing.assert_array_equal(base.merge(found)["embed"]["table"], table.dense())


def test_scales_of_scales_have_their_mean_and_their_error_bound():
    scale = jax.random.uniform(jax.random.key(0), (2, 48, 20), minval=0.5, maxval=1.5)
    node = double.quantize(scale)
    assert node.codes.shape == scale.shape and node.absmax.shape == (2, 4)
    np.testing.assert_allclose(node.offset, scale.mean((1, 2)), rtol=1e-5)
    step = 0.9 / 64 / 2 * node.absmax.max()
    assert jnp.abs(double.scales(node) - scale).max() <= step


def test_axes_have_a_name_for_each_axis_of_each_leaf(params):
    names = {
        "layer": {"kernel": ("layers", "embed", "ffn")},
        "embed": {"table": ("vocab", "embed")},
    }
    for format in FORMATS.values():
        found = quantize(params, r".*", format)
        axes = base.leaf_axes(found, names)
        for leaf, names_of in zip(
            jax.tree.leaves(found),
            jax.tree.leaves(axes, is_leaf=lambda n: isinstance(n, tuple)),
            strict=True,
        ):
            assert leaf.ndim == len(names_of)
    assert axes["layer"]["kernel"].codes == ("layers", "ffn", "embed")


def test_bad_input(params):
    with pytest.raises(
        ValueError, match=r"layer/kernel \(3, 32, 48\): groups of 64 do not fill 32"
    ):
        quantize(params, "layer/kernel", Codebook())
    done = quantize(params, "layer/kernel", Codebook(group=16))
    with pytest.raises(ValueError, match="layer/kernel is a Quantized already"):
        quantize(done, "layer/kernel", Codebook(group=16))
    adapted = lora.add(params, "layer/kernel", jax.random.key(0), rank=2)
    with pytest.raises(ValueError, match="layer/kernel is a LoRA already"):
        quantize(adapted, "layer/kernel", Codebook(group=16))
    for number in (jnp.nan, jnp.inf):
        broken = {"layer": {"kernel": params["layer"]["kernel"].at[1, 2, 3].set(number)}}
        with pytest.raises(ValueError, match=r"layer/kernel \(3, 32, 48\) holds nan or inf"):
            quantize(broken, ".*", Integer())
    with pytest.raises(ValueError, match="2, 3, 4, 8 bits, not 5"):
        Integer(5)
    with pytest.raises(ValueError, match="no table 'NF5'"):
        Codebook("NF5")
    with pytest.raises(ValueError, match="DYNAMIC has not"):
        Codebook("DYNAMIC")
    with pytest.raises(ValueError, match="no quantized matrix"):
        bits_per_parameter(params)
