"""The choice of a kernel is by shape, reported, and never silent."""

import jax
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.blockwise import blockwise
from research.kernels.mask import Mask
from research.kernels.select import attend_auto, kernel, kernel_name


def test_decoding_takes_the_reference_and_training_does_not():
    assert kernel_name(1, 4096) == "reference"
    assert kernel_name(8, 8) == "reference"
    assert kernel_name(256, 256) == kernel_name(2048, 2048) == "blockwise"
    assert kernel_name(2048, 2048, backend="gpu") == "reference"


@pytest.mark.parametrize("T", [1, 64])
def test_auto_runs_the_kernel_it_names(key, T):
    q, k, v = (jax.random.normal(x, (1, 64, 2, 8)) for x in jax.random.split(key, 3))
    q, mask = q[:, -T:], Mask(offset=64 - T)
    tiled = "custom_vjp" in str(jax.make_jaxpr(lambda *x: attend_auto(*x, mask))(q, k, v))
    assert tiled == (kernel_name(T, 64) == "blockwise")
    np.testing.assert_allclose(
        attend_auto(q, k, v, mask, 0.2), reference(q, k, v, mask, 0.2), atol=2e-6
    )


def test_a_kernel_that_does_not_exist_is_an_error():
    assert kernel("blockwise") is blockwise
    with pytest.raises(ValueError, match="no attention kernel 'flash'; there are auto, blockwise"):
        kernel("flash")
