"""Ranges of clipped groups against every choice tried in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.quantize import clip
from research.weights.formats import Codebook, Integer
from research.weights.quantized import quantized

FORMATS = [
    Integer(3, 8),
    Integer(3, 8, "integer"),
    Integer(2, "row", "minimum"),
    Integer(4, "matrix"),
]


def rows_and_inputs():
    rng = np.random.default_rng(0)
    rows = rng.standard_t(3, (5, 16)).astype(np.float32)
    inputs = (rng.normal(size=(40, 16)) @ rng.normal(size=(16, 16))).astype(np.float32)
    return rows, inputs


def rounded(rows, format, shrink):
    """In numpy float64, groups [rows, groups, size] clipped at shrink of their largest magnitude."""
    n, size = 2**format.bits - 1, format.group if isinstance(format.group, int) else 16
    cut = rows.astype(np.float64).reshape(5, -1, size)
    axes = (0, 1, 2) if format.group == "matrix" else 2
    most = np.abs(cut).max(axes, keepdims=True) * shrink
    if format.zero_point == "middle":
        step = most / (n // 2)
        return (np.clip(np.round(cut / step), -(n // 2), n // 2) * step).reshape(rows.shape)
    low, high = (np.clip(end(axes, keepdims=True), -most, most) for end in (cut.min, cut.max))
    if format.zero_point == "integer":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    step = (high - low) / n
    if format.zero_point == "minimum":
        return (np.clip(np.round((cut - low) / step), 0, n) * step + low).reshape(rows.shape)
    zero = np.round(-low / step)
    return ((np.clip(np.round(cut / step) + zero, 0, n) - zero) * step).reshape(rows.shape)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["none", "squares", "moments"])
def test_the_range_of_each_group_is_the_best_that_was_tried(format, kind):
    rows, inputs = rows_and_inputs()
    second = inputs.T @ inputs
    importance = {"none": None, "squares": np.diag(second), "moments": second}[kind]
    scale, zero = clip.ranges(
        jnp.asarray(rows), format, None if importance is None else jnp.asarray(importance)
    )
    found = format.values(format.round(jnp.asarray(rows), scale, zero), scale, zero)
    size = format.group if isinstance(format.group, int) else 16
    groups = [slice(None)] if format.group != 8 else [slice(0, 8), slice(8, 16)]

    def error(wrong, part):
        """[rows]: of the part of the outputs that these columns are."""
        wrong = np.asarray(wrong, np.float64)[:, part]
        if kind == "moments":
            return np.square(wrong @ inputs[:, part].T).sum(1)
        weights = 1 if kind == "none" else np.square(inputs[:, part]).sum(0)
        return (np.square(wrong) * weights).sum(1)

    tried = [rounded(rows, format, shrink) - rows for shrink in clip.SHRINKS]
    chosen = np.zeros(rows.shape)
    for part in groups:
        errors = np.array([error(wrong, part) for wrong in tried])
        if format.group == "matrix":
            errors = np.broadcast_to(errors.sum(1, keepdims=True), errors.shape)
        best = errors.argmin(0)
        assert (best > 0).any() or size == 16
        for row, at in enumerate(best):
            chosen[row, part] = tried[at][row, part]
    if kind == "moments":  # a row that is worse as a whole is not clipped
        whole, clipped = (error(wrong, slice(None)) for wrong in (tried[0], chosen))
        keep = whole.sum() <= clipped.sum() if format.group == "matrix" else whole <= clipped
        chosen = np.where(np.broadcast_to(keep, (5,))[:, None], tried[0], chosen)
    np.testing.assert_allclose(found - rows, chosen, atol=1e-4)


def test_a_whole_model_is_never_worse_for_it_and_mostly_better():
    rows, inputs = rows_and_inputs()
    w = jnp.stack([rows.T, 2 * rows.T[::-1]])  # [L, in, out]
    moments = {"second": jnp.stack([inputs.T @ inputs] * 2), "rows": jnp.full(2, 40.0)}
    params, format = {"a": {"kernel": w}, "b": {"table": jnp.asarray(rows)}}, Integer(3, 8)
    plain = clip.quantize(params, ".*", format)
    weighed = clip.quantize(params, "a/kernel", format, {"a/kernel": moments})["a"]["kernel"]
    nearest = quantized("a/kernel", w, format)
    assert weighed.codes.shape == nearest.codes.shape and weighed.transposed

    def squares(node):
        return np.square(node.dense() - w).sum((1, 2))

    def outputs(node):
        return np.square(inputs @ np.asarray(node.dense() - w)).sum((1, 2))

    assert (squares(plain["a"]["kernel"]) < 0.9 * squares(nearest)).all()
    assert (outputs(weighed) < 0.9 * outputs(nearest)).all()
    assert not plain["b"]["table"].transposed
    error = np.square(plain["b"]["table"].dense() - rows).sum()
    assert (
        error
        < 0.9 * np.square(quantized("b/table", jnp.asarray(rows), format).dense() - rows).sum()
    )


def test_bad_input():
    rows = jnp.ones((5, 16))
    with pytest.raises(ValueError, match="needs an Integer format"):
        clip.ranges(rows, Codebook(group=8))
    for shrinks in ([], [1.2], [0.0]):
        with pytest.raises(ValueError, match="ratios above 0"):
            clip.ranges(rows, Integer(4, 8), shrinks=shrinks)
    with pytest.raises(ValueError, match="is of 8 columns, not 16"):
        clip.ranges(rows, Integer(4, 8), jnp.ones(8))
    params = {"a": {"kernel": rows.T}}
    with pytest.raises(ValueError, match=r"a/kernel \(16, 5\): groups of 64 do not fill 16"):
        clip.quantize(params, ".*", Integer(4, 64))
    with pytest.raises(ValueError, match="say nothing of the inputs of a/kernel"):
        clip.quantize(params, ".*", Integer(4, 8), {})
    done = clip.quantize(params, ".*", Integer(4, 8))
    with pytest.raises(ValueError, match="a/kernel is a Quantized already"):
        clip.quantize(done, ".*", Integer(4, 8))
