"""Windows far apart, and what rows keep of a quantized model, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shared import few_bits
from research.evaluate.quantization import Comparison
from research.weights.formats import Integer
from research.weights.quantized import quantize


def test_windows_are_as_far_apart_as_they_can_be():
    found = few_bits.spaced(list(range(105)), 10, 3)
    np.testing.assert_array_equal(found[:, 0], [0, 40, 90])
    np.testing.assert_array_equal(found[1], range(40, 50))
    assert few_bits.spaced(list(range(105)), 10, 0).shape == (0, 10)
    with pytest.raises(ValueError, match="11 windows of 10 tokens, but the text has 10"):
        few_bits.spaced(list(range(105)), 10, 11)


def test_errors_of_a_rise_are_paired_by_window():
    """Windows that differ by much more than the rise, which is the same but for a little."""
    full, nll = np.array([1.0, 5.0, 3.0]), np.array([1.2, 5.1, 3.3])
    row = few_bits.summary(Comparison(np.array([0.1, 0.2, 0.3]), full, nll, np.ones(3)))
    assert row["rise"] == pytest.approx(0.2) and row["rise_se"] == pytest.approx(0.1 / 3**0.5)
    assert row["nll_se"] == pytest.approx(np.std(nll, ddof=1) / 3**0.5) and row["nll_se"] > 1
    assert row["divergence"] == pytest.approx(0.2) and row["agreement"] == 1
    assert row["perplexity"] == pytest.approx(np.exp(3.2))
    assert row["full_perplexity"] == pytest.approx(np.exp(3))


def test_percent_by_hand():
    assert few_bits.percent({"rise": np.log(1.02), "rise_se": 0.01}) == pytest.approx((2, 1.02))


def test_sizes_and_errors_of_matrices_by_hand():
    params = {"norm": {"scale": jnp.ones(8)}, "up": {"kernel": jnp.eye(8)}}
    assert few_bits.sizes(params) == {"parameter_bytes": 4 * (8 + 64)}
    # 4 bits a number and a float32 for each of 8 columns; 7 / 7 and 0 are codes.
    few = quantize(params, ".*/kernel", Integer(4, "row"))
    assert few_bits.sizes(few) == {"parameter_bytes": 32 + 32 + 32, "bits_per_parameter": 8}
    assert few_bits.matrix_error(params, few, ".*/kernel") == 0
    double = jax.tree.map(lambda x: 1.5 * x, params)
    assert few_bits.matrix_error(params, double, ".*/kernel") == pytest.approx(0.5)
