"""Matrices that round while they train: values, the straight-through gradient, LSQ's by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.weights import base, fake
from research.weights.formats import Codebook, Float8, Integer
from research.weights.quantized import quantize, quantized

FORMATS = {
    "NF4": Codebook(group=16),
    "NF4, double": Codebook(group=16, double=True),
    "int2": Integer(2, 8),
    "int3, zero": Integer(3, 16, "integer"),
    "int4, minimum": Integer(4, 16, "minimum"),
    "int8 by matrix": Integer(8, "matrix"),
    "e4m3": Float8(),
}
LEARNED = {"int2": Integer(2, 8), "int3 by row": Integer(3, "row"), "int4": Integer(4, "matrix")}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def both(format, learned_step=False):
    tree = {"t": {"table": normal(0, 24, 16)}, "k": {"kernel": normal(1, 3, 16, 32)}}
    return tree, fake.add(tree, ".*", format, learned_step)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_quantization_and_the_gradient_passes(name):
    tree, params = both(FORMATS[name])
    found, expected = base.merge(params), base.merge(quantize(tree, ".*", FORMATS[name]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    g = normal(2, 3, 16, 32)
    grad = jax.grad(lambda p: (p["k"]["kernel"].dense() * g).sum())(params)
    np.testing.assert_array_equal(grad["k"]["kernel"].base, g)


def test_a_product_under_scan_whose_backward_pass_builds_the_matrix_again():
    params = both(FORMATS["int2"])[1]
    x, inner = normal(3, 5, 16), jnp.ones((32, 16)) / 32

    def run(kernel):
        return jax.lax.scan(lambda x, w: (base.matmul(x, w) @ inner, None), x, kernel)[0].sum()

    straight = jax.jit(jax.grad(run))(params["k"]["kernel"]).base
    plain = jax.grad(run)(params["k"]["kernel"].dense())
    np.testing.assert_allclose(straight, plain, rtol=1e-4, atol=1e-4)


# Of double quantized matrices the values have scales that the codes were not found with.
@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].double])
def test_no_format_clips_with_its_own_scales(name):
    """Every number is at most half the widest gap of its group from its value."""
    rows = normal(4, 2, 32) ** 3
    node = quantized("a/kernel", rows.T, FORMATS[name])
    codes = jnp.arange(2**node.format.bits, dtype=jnp.uint8)
    scale = jnp.broadcast_to(node.scale, (2, *node.scale.shape[1:]))
    for row, per_group in enumerate(np.asarray(scale)):
        for group, size in enumerate(per_group):
            zero = None if node.zero is None else node.zero[row, group].reshape(1, 1)
            values = node.format.values(codes[None], jnp.full((1, 1), size), zero)
            gap = jnp.diff(jnp.sort(values[jnp.isfinite(values)])).max()
            part = np.split(np.asarray(rows), len(per_group), axis=1)[group][row]
            kept = np.split(np.asarray(node.values()), len(per_group), axis=1)[group][row]
            assert np.abs(part - kept).max() <= 0.5001 * gap


def test_a_learned_step_by_hand():
    """3 bits: steps -4 .. 3 of 0.5; one number is above the range, one below."""
    w = jnp.array([[0.6, 3.0, -0.9, -2.5]])
    node = fake.LearnedStep(w, jnp.array([[0.5]]), Integer(3, "row"), transposed=False)
    assert node.dense().tolist() == [[0.5, 1.5, -1.0, -2.0]]
    grad = jax.grad(lambda node: node.dense().sum())(node)
    assert grad.base.tolist() == [[1, 0, 1, 0]]
    inside = (1 - 1.2) + (-2 + 1.8)
    np.testing.assert_allclose(grad.step, [[(inside + 3 - 4) / (4 * 3) ** 0.5]], rtol=1e-5)


def test_a_step_begins_at_twice_the_mean_magnitude_over_the_root_of_the_last_step():
    w = jnp.array([[0.6, 3.0], [-0.9, -1.5]])
    node = fake.add({"k": {"kernel": w}}, ".*", Integer(4, "row"), True)["k"]["kernel"]
    np.testing.assert_allclose(node.step[:, 0], 2 * jnp.array([0.75, 2.25]) / 7**0.5, rtol=1e-6)
    zeros = fake.add({"k": {"kernel": jnp.zeros((2, 2))}}, ".*", Integer(4, 2), True)
    assert not base.merge(zeros)["k"]["kernel"].any()


@pytest.mark.parametrize("name", LEARNED)
def test_each_group_learns_its_step_with_the_papers_gradient(name):
    """Against its formula in numpy, group by group."""
    format = LEARNED[name]
    _, params = both(format, True)
    node, g = params["k"]["kernel"], normal(2, 3, 16, 32)
    grad = jax.jit(jax.grad(lambda node: (node.dense() * g).sum()))(node)
    rows, above = np.asarray(node.base.mT), np.asarray(g.mT)
    size = {"row": 16, "matrix": 512}.get(format.group, format.group)
    v, above = (a.reshape(3, -1, size) for a in (rows, above))
    step = np.asarray(node.step).reshape(3, -1, 1)
    most = format.middle - 1
    scaled = v / step
    inside = (scaled > -most - 1) & (scaled < most)
    slope = np.where(inside, np.round(scaled) - scaled, np.clip(scaled, -most - 1, most))
    expected = (slope * above).sum(-1) / (size * most) ** 0.5
    np.testing.assert_allclose(grad.step.reshape(3, -1), expected, rtol=1e-3, atol=1e-5)
    masked = (above * inside).reshape(3, 32, 16)
    np.testing.assert_allclose(grad.base.mT, masked, rtol=1e-5)  # and 0 outside
    assert inside.mean() > 0.9 and inside.all() == (name == "int4")


@pytest.mark.parametrize("name", LEARNED)
def test_finished_matrices_have_the_same_values(name):
    _, params = both(LEARNED[name], True)
    done = fake.finish(params)
    codes = done["k"]["kernel"].values() / done["k"]["kernel"].scale.repeat(
        16 // done["k"]["kernel"].scale.shape[-1], -1
    )
    middle = LEARNED[name].middle
    assert -middle <= codes.round().min() and codes.round().max() <= middle - 1
    if name == "int2":  # the first code too, which a format of its own scales does not use
        assert codes.round().min() == -middle
    jax.tree.map(np.testing.assert_array_equal, base.merge(done), base.merge(params))


def test_axes_have_a_name_for_each_axis_of_each_leaf():
    names = {"t": {"table": ("vocab", "embed")}, "k": {"kernel": ("layers", "embed", "ffn")}}
    for format in LEARNED.values():
        for learned in (False, True):
            params = both(format, learned)[1]
            axes = base.leaf_axes(params, names)
            same = jax.tree.map(lambda leaf, names: leaf.ndim == len(names), params, axes)
            assert all(jax.tree.leaves(same))
    axes = base.leaf_axes(both(LEARNED["int2"], True)[1], names)
    assert axes["k"]["kernel"].step == ("layers", "ffn", None)
    assert axes["t"]["table"].step == ("vocab", None)


def test_bad_input():
    params = {"k": {"kernel": jnp.ones((16, 8))}}
    with pytest.raises(ValueError, match="a learned step needs an Integer format"):
        fake.add(params, ".*", Codebook(group=16), learned_step=True)
    with pytest.raises(ValueError, match="zero_point='middle' and double=False"):
        fake.add(params, ".*", Integer(4, 16, double=True), learned_step=True)
    for learned in (False, True):
        with pytest.raises(ValueError, match=r"k/kernel \(16, 8\): groups of 12 do not fill 16"):
            fake.add(params, ".*", Integer(4, 12), learned)
        with pytest.raises(ValueError, match=r"k/kernel \(16, 8\) holds nan or inf"):
            fake.add({"k": {"kernel": jnp.full((16, 8), jnp.inf)}}, ".*", Integer(4, 16), learned)
        with pytest.raises(ValueError, match="k/kernel is a Quantized already"):
            fake.add(quantize(params, ".*", Integer(4, 16)), ".*", Integer(4, 16), learned)
    with pytest.raises(ValueError, match="no fake-quantized matrix"):
        fake.finish(params)
