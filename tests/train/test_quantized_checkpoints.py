"""Checkpoints of parameters in few bits come back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.train import checkpoint
from research.weights import lora
from research.weights.formats import Codebook, Float8, Integer
from research.weights.quantized import quantize

FORMATS = {
    "a/kernel": Codebook(group=8, double=True),
    "b/kernel": Integer(3, 8, "integer"),
    "c/kernel": Float8("e5m2"),
    "embed/table": Integer(4, 8, "minimum"),
}


@pytest.fixture(scope="module")
def params():
    kernels = jax.random.normal(jax.random.key(0), (3, 2, 16, 24))
    found = {name: {"kernel": kernel} for name, kernel in zip("abc", kernels, strict=True)}
    found["embed"] = {"table": jax.random.normal(jax.random.key(2), (10, 16))}
    for path, format in FORMATS.items():
        found = quantize(found, path, format)
    half = found["embed"]["table"]
    found["embed"]["table"] = half.replace(scale=half.scale.astype(jnp.float16))
    return lora.add(found, "a/kernel", jax.random.key(1), rank=2)


def test_round_trip(params, tmp_path):
    saved = checkpoint.save(tmp_path, 3, params)
    target = jax.tree.map(jnp.zeros_like, params)
    found = checkpoint.restore(saved, target).tree
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_other_groups_are_named(params, tmp_path):
    saved = checkpoint.save(tmp_path, 3, params)
    kernel = jax.random.normal(jax.random.key(0), (2, 16, 24))
    other = params | quantize({"b": {"kernel": kernel}}, "b/kernel", Integer(3, 16, "integer"))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"holds b.kernel.scale: float32\[2, 24, 2\]"
    ):
        checkpoint.restore(saved, other)
