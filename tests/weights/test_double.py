"""Double quantization against a loop over its blocks."""

import jax.numpy as jnp
import numpy as np

from research.codes.tables import TABLES
from research.weights import double


def loop(scale):
    """(values, absmax, offset) of scales [rows, groups], nearest entries found one by one."""
    table = TABLES["DYNAMIC"].astype(np.float64)
    flat = scale.astype(np.float64).reshape(-1)
    offset, values, absmax = flat.mean(), [], []
    for start in range(0, len(flat), 256):
        block = flat[start : start + 256] - offset
        largest = max(abs(x) for x in block)
        absmax.append(largest)
        values += [largest * table[np.argmin(np.abs(table - x / largest))] for x in block]
    return offset + np.reshape(values, scale.shape), np.array(absmax), offset


def test_each_matrix_is_what_a_loop_over_its_blocks_makes_of_it():
    scale = np.random.default_rng(0).gamma(9.0, 0.1, size=(2, 30, 20)).astype(np.float32)
    made = double.quantize(jnp.asarray(scale))
    assert made.codes.shape == scale.shape and made.absmax.shape == (2, 3)
    values = np.asarray(double.scales(made))
    for number in range(2):
        expected, absmax, offset = loop(scale[number])
        np.testing.assert_allclose(made.absmax[number], absmax, rtol=1e-5)
        np.testing.assert_allclose(made.offset[number], offset, rtol=1e-6)
        # Two numbers next to a middle may go either way, and no step is wider than 1/70 of absmax.
        wrong = np.abs(values[number] - expected) > 3e-5 * absmax.max()
        assert wrong.sum() <= 2
        assert np.abs(values[number] - scale[number]).max() < absmax.max() / 140 * 1.01
