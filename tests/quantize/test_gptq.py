"""GPTQ against the recursion it comes from, written down again in float64 numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.codes.tables import NF4
from research.quantize import gptq
from research.weights.formats import Codebook, Float8, Integer

FORMATS = {
    "4 bits": Integer(4, 16),
    "3 bits, zero": Integer(3, 16, "integer"),
    "2 bits, minimum": Integer(2, 32, "minimum"),
    "3 bits by row": Integer(3, "row"),
    "4 bits by matrix": Integer(4, "matrix", "integer"),
    "NF4": Codebook(group=16),
}
SIZE = 64


def problem(seed, rows=SIZE, size=SIZE, samples=400):
    """Rows, and inputs [samples, size] that are alike and of different sizes, with their Hessian."""
    rng = np.random.default_rng(seed)
    mixed = np.eye(size) + rng.normal(size=(size, size)) / size**0.5
    inputs = rng.normal(size=(samples, size)) @ mixed * np.exp(0.5 * rng.normal(size=size))
    return rng.normal(size=(rows, size)), inputs, 2 * inputs.T @ inputs / samples


def nearest(format, columns, low, high):
    """What the numbers [out, n] become, in groups whose least and largest are `low` and `high`."""
    most = np.maximum(np.abs(low), np.abs(high))
    if isinstance(format, Codebook):
        table = np.array(NF4)
        return table[np.abs(columns[..., None] / most[..., None] - table).argmin(-1)] * most
    last = 2**format.bits - 1
    if format.zero_point == "middle":
        scale = most / (last // 2)
        return np.clip(np.round(columns / scale), -(last // 2), last // 2) * scale
    if format.zero_point == "minimum":
        scale = (high - low) / last
        return np.clip(np.round((columns - low) / scale), 0, last) * scale + low
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / last
    zero = np.round(-low / scale)
    return (np.clip(np.round(columns / scale) + zero, 0, last) - zero) * scale


def ends(format, rows):
    axis = None if format.group == "matrix" else 1
    return rows.min(axis, keepdims=True), rows.max(axis, keepdims=True)


def eliminate(rows, hessian, format, damping=0.01, order=None):
    """One column after another, each leaving the inverse Hessian (Sherman, Morrison); `order` with
    the ends of the groups of the given rows."""
    rows, width = np.array(rows, np.float64), rows.shape[1]
    size = format.group if isinstance(format.group, int) else width
    static = [ends(format, rows[:, g : g + size]) for g in range(0, width, size)]
    inverse = np.linalg.inv(hessian + damping * np.diag(hessian).mean() * np.eye(width))
    found = np.zeros_like(rows)
    for place, j in enumerate(range(width) if order is None else order):
        if order is not None:
            low, high = static[j // size]
        elif place % size == 0:
            low, high = ends(format, rows[:, j : j + size])
        found[:, j : j + 1] = nearest(format, rows[:, j : j + 1], low, high)
        rows -= np.outer((rows[:, j] - found[:, j]) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


def output_error(rows, found, inputs):
    return np.square((rows - found) @ inputs.T).mean()


def solved(rows, hessian, format, **options):
    found = gptq.quantize(jnp.asarray(rows), jnp.asarray(hessian), format, **options)
    return np.asarray(format.values(*found))


@partial(jax.jit, static_argnums=1)
def to_nearest(rows, format):
    """Codes, scale and zero without GPTQ."""
    rows = rows.astype(jnp.float32)
    scale, zero = format.scales(rows)
    return format.round(rows, scale, zero), scale, zero


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_inputs_that_have_nothing_to_do_with_each_other_round_to_nearest(name, act_order):
    rows, _, _ = problem(0)
    found = gptq.quantize(jnp.asarray(rows), 3 * jnp.eye(SIZE), FORMATS[name], act_order=act_order)
    expected = to_nearest(rows, FORMATS[name])
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_elimination_column_by_column(name):
    rows, inputs, hessian = problem(4)
    format = FORMATS[name]
    found = solved(rows, hessian, format)
    np.testing.assert_allclose(found, eliminate(rows, hessian, format), atol=1e-5)
    plain = format.values(*to_nearest(rows, format))
    assert output_error(rows, found, inputs) < 0.75 * output_error(rows, plain, inputs)


@pytest.mark.parametrize("name", FORMATS)
def test_act_order_is_elimination_of_large_inputs_first(name):
    rows, inputs, hessian = problem(2)
    order, format = np.argsort(-np.diag(hessian)), FORMATS[name]
    found = solved(rows, hessian, format, act_order=True)
    expected = eliminate(rows, hessian, format, order=order)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = format.values(*to_nearest(rows, format))
    assert output_error(rows, found, inputs) < 0.5 * output_error(rows, plain, inputs)


@pytest.mark.parametrize("width, block", [(192, 96), (131, 1)])
def test_blocks_change_nothing(width, block):
    """A row longer than a block, and one that no block divides."""
    assert max(n for n in range(1, gptq.BLOCK + 1) if width % n == 0) == block
    rows, _, hessian = problem(3, 8, width, 600)
    format = Integer(3, "row")
    found = gptq.quantize(jnp.asarray(rows), jnp.asarray(hessian), format)
    values = format.values(*found)
    np.testing.assert_allclose(values, eliminate(rows, hessian, format), atol=1e-5)


def test_layers_are_solved_each_by_itself_and_under_jit():
    problems = [problem(seed, 8, 32) for seed in (4, 5)]
    rows, hessian = (jnp.stack([jnp.asarray(p[n]) for p in problems]) for n in (0, 2))
    format = Integer(3, 16, "integer")
    codes, scale, zero = jax.jit(lambda w, h: gptq.quantize(w, h, format))(rows, hessian)
    assert codes.shape == (2, 8, 32) and scale.shape == zero.shape == (2, 8, 2)
    for layer in range(2):
        one = gptq.quantize(rows[layer], hessian[layer], format)
        np.testing.assert_array_equal(codes[layer], one[0])
        np.testing.assert_allclose(scale[layer], one[1], rtol=1e-5)
        np.testing.assert_array_equal(zero[layer], one[2])


def test_a_column_without_input_is_rounded_by_itself():
    rows, inputs, _ = problem(6, 8, 32)
    inputs[:, [3, 20]] = 0
    rows[:, 0] = 5  # the largest, so that a row has one scale with the two and without them
    hessian, format = 2 * inputs.T @ inputs / len(inputs), Integer(4, 32)
    found = solved(rows, hessian, format)
    plain = np.asarray(format.values(*to_nearest(rows, format)))
    np.testing.assert_array_equal(found[:, [3, 20]], plain[:, [3, 20]])
    alive = np.delete(np.arange(32), [3, 20])
    expected = eliminate(rows[:, alive], hessian[np.ix_(alive, alive)], Integer(4, 30))
    np.testing.assert_allclose(found[:, alive], expected, atol=1e-5)
    silent = solved(rows, np.zeros((32, 32)), format)
    np.testing.assert_array_equal(silent, plain)


def test_8_bit_floats_stay_in_their_range():
    """Columns grow while errors are made good, and their scale is that of the given row."""
    rows, inputs, hessian = problem(7, 16, 32)
    rows[:, -1] = 2 * np.abs(rows).max(1)
    format = Float8("e5m2")
    found = solved(rows, hessian, format)
    plain = format.values(*to_nearest(rows, format))
    assert output_error(rows, found, inputs) < output_error(rows, plain, inputs)


def test_bad_input():
    rows, inputs, hessian = problem(8, 8, 32)
    few = inputs[:20].T @ inputs[:20]
    with pytest.raises(ValueError, match=r"\(32, 32\) is not positive definite with damping 0"):
        gptq.quantize(jnp.asarray(rows), jnp.asarray(few), Integer(4, 16), damping=0)
    alike = inputs.copy()
    alike[:, 7] = 2 * alike[:, 3]
    with pytest.raises(ValueError, match="some inputs follow from others"):
        gptq.quantize(jnp.asarray(rows), jnp.asarray(alike.T @ alike), Integer(4, 16), damping=0)
    assert np.isfinite(solved(rows, few, Integer(4, 16))).all()
    with pytest.raises(ValueError, match="nan or inf"):
        gptq.quantize(jnp.asarray(rows), jnp.full((32, 32), jnp.nan), Integer(4, 16))
    under = jax.jit(lambda w, h: gptq.quantize(w, h, Integer(4, "row"), damping=0))
    assert np.isnan(under(rows, few)[1]).all()
    with pytest.raises(ValueError, match="groups of 24 do not fill 32 columns"):
        gptq.quantize(jnp.asarray(rows), jnp.asarray(hessian), Integer(4, 24))
    with pytest.raises(ValueError, match=r"rows \(8, 32\) need a Hessian .* not \(16, 16\)"):
        gptq.quantize(jnp.asarray(rows), jnp.eye(16), Integer(4, 16))
    with pytest.raises(ValueError, match="damping is not below 0"):
        gptq.quantize(jnp.asarray(rows), jnp.asarray(hessian), Integer(4, 16), damping=-1)
