"""What becomes of tensors in few bits that cannot be leaves of their own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.hub.assemble import assemble
from research.hub.checkpoint import Checkpoint
from research.hub.quantized_stack import described
from research.models.families.checkpoint import Entry, packed
from research.weights.formats import Codebook, Integer
from research.weights.quantized import quantized

NODE = quantized("w/kernel", jax.random.normal(jax.random.key(0), (8, 4)), Integer(4, 8))
STORED = NODE.replace(transposed=False)  # rows [out, in], as a checkpoint has them


def checkpoint():
    kind = described((4, 8), Integer(4, 8))
    read = lambda name: np.asarray(STORED.values())  # noqa: E731
    return Checkpoint(Path("memory"), {}, {"w": (4, 8)}, read, {"w": kind}, lambda name: STORED)


def test_columns_of_one_tensor_are_dense_and_said_so(capsys):
    shapes = {name: jax.ShapeDtypeStruct((8, 2), jnp.float32) for name in "qk"}
    found = assemble(checkpoint(), packed("w", {"q": 2, "k": 2}, transpose=True), shapes)
    np.testing.assert_array_equal(jnp.concatenate([found["q"], found["k"]], 1), NODE.dense())
    said = capsys.readouterr().out
    assert said.count("is loaded dense: w holds other matrices too") == 2


def test_a_tensor_of_its_own_stays_whichever_way_it_lies():
    turned = assemble(
        checkpoint(), [Entry("w", "w", transpose=True)], {"w": jax.ShapeDtypeStruct((8, 4), float)}
    )
    np.testing.assert_array_equal(turned["w"].dense(), NODE.dense())
    plain = assemble(checkpoint(), [Entry("w", "w")], {"w": jax.ShapeDtypeStruct((4, 8), float)})
    np.testing.assert_array_equal(plain["w"].dense(), NODE.dense().T)
    assert turned["w"].transposed and not plain["w"].transposed


@pytest.mark.parametrize(
    "format",
    [Integer(4, 8), Integer(3, 8, "integer"), Codebook("FP4", 16, double=True), Integer(8, "row")],
)
def test_what_is_described_has_the_shapes_of_what_is_quantized(format):
    node = quantized("w/kernel", jnp.ones((48, 40)), format)
    zero = jnp.uint8 if node.zero is not None else None
    kind = described((40, 48), format, jnp.float32, zero, transposed=True)
    assert jax.tree.structure(kind) == jax.tree.structure(node)
    for said, leaf in zip(jax.tree.leaves(kind), jax.tree.leaves(node), strict=True):
        assert said.shape == leaf.shape and said.dtype == leaf.dtype


def test_what_cannot_be_described():
    with pytest.raises(ValueError, match="groups of 5 do not fill rows of 8"):
        described((4, 8), Integer(4, 5))
    with pytest.raises(ValueError, match="8 codes of 3 bits do not divide rows of 12"):
        described((4, 12), Integer(3, 4))
