"""What cuDNN's attention is asked for, by JAX's own form of the same call."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.cudnn import cudnn
from research.kernels.mask import Mask


@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(causal=False), Mask(window=5), Mask(causal=False, window=7)],
    ids=["causal", "full", "window", "two-sided window"],
)
def test_the_call_means_what_the_contract_says(key, mask):
    q, k, v = (
        jax.random.normal(x, (2, 24, n, 16))
        for x, n in zip(jax.random.split(key, 3), (4, 2, 2), strict=True)
    )
    ours = partial(cudnn, implementation="xla")(q, k, v, mask, 0.3)
    np.testing.assert_allclose(ours, reference(q, k, v, mask, 0.3), atol=2e-6)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask(offset=3), "the mask's offset must be the int 0"),
        (Mask(prefix=jnp.zeros(1, int)), "has no prefix in its mask"),
        (Mask(slopes=jnp.ones(1)), "has no slopes in its mask"),
        (Mask(query_segments=jnp.ones((1, 8)), key_segments=jnp.ones((1, 8))), "has no query_segm"),
    ],
)
def test_what_it_cannot_say_is_refused(mask, message):
    q = jnp.ones((1, 8, 1, 16))
    with pytest.raises(ValueError, match=message):
        cudnn(q, q, q, mask, implementation="xla")


def test_what_only_cudnn_itself_cannot_is_refused_before_the_device():
    q = jnp.ones((1, 8, 1, 16))
    with pytest.raises(ValueError, match="has no window to the right"):
        cudnn(q, q, q, Mask(causal=False, window=3))
    with pytest.raises(ValueError, match="no zeros to queries whose window ends before"):
        cudnn(q, q[:, :4], q[:, :4], Mask(window=3), implementation="xla")
