"""Tensors that pack several leaves, and leaves that are read straight into their shards."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hub_reference import FIXTURES
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research import hub
from research.hub.assemble import assemble, disassemble
from research.hub.checkpoint import Checkpoint, CheckpointError
from research.models.families.checkpoint import Columns, Entry, packed
from research.paths import named_leaves
from research.train.sharding import ShardingError, make_mesh

L, D, H, N = 2, 5, 3, 4


def checkpoint(tensors):
    shapes = {name: array.shape for name, array in tensors.items()}
    return Checkpoint(Path("memory"), {}, shapes, tensors.__getitem__)


def tree(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def test_columns_of_one_group_and_of_many():
    wide = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(Columns(4, 6, 12).of(wide), wide[:, 4:6])
    # Four groups of three columns; the second and third of each are ours.
    np.testing.assert_array_equal(Columns(1, 3, 3).of(wide)[0], [1, 2, 4, 5, 7, 8, 10, 11])
    np.testing.assert_array_equal(Columns(1, 3, 3).of(wide[1]), Columns(1, 3, 3).of(wide)[1])
    assert Columns(1, 3, 3).packed(8) == 12


@pytest.mark.parametrize("transpose", [False, True])
def test_packed_tensors_come_apart_and_together_again(transpose):
    """q, k, v side by side in one tensor, head by head in another, and a bias among them."""
    rng = np.random.default_rng(0)
    entries = [
        *packed("{layer}.side", {"q": 6, "k": 2, "v": 2}, transpose),
        *packed("{layer}.heads", {"qh": H, "kh": H, "vh": H}, transpose),
        *packed("{layer}.bias", {"bq": 6, "bk": 4}),
        Entry("final", "final"),
    ]
    wide = {f"{layer}.side": rng.normal(size=(D, 10)) for layer in range(L)}
    wide |= {f"{layer}.heads": rng.normal(size=(D, N * 3 * H)) for layer in range(L)}
    stored = {name: (array.T if transpose else array) for name, array in wide.items()}
    stored |= {f"{layer}.bias": rng.normal(size=10) for layer in range(L)}
    stored = {name: array.astype(np.float32) for name, array in stored.items()}
    stored["final"] = np.ones(D, np.float32)
    shapes = tree(q=(L, D, 6), k=(L, D, 2), v=(L, D, 2), bq=(L, 6), bk=(L, 4), final=(D,))
    shapes |= tree(**{name: (L, D, N * H) for name in ("qh", "kh", "vh")})

    found = assemble(checkpoint(stored), entries, shapes)
    one = wide["1.side"].astype(np.float32)
    np.testing.assert_array_equal(found["k"][1], one[:, 6:8])
    by_head = wide["1.heads"].astype(np.float32).reshape(D, N, 3, H)
    np.testing.assert_array_equal(found["vh"][1], by_head[:, :, 2].reshape(D, -1))
    np.testing.assert_array_equal(found["bk"][0], stored["0.bias"][6:])

    specs, again = disassemble(entries, found)
    again = dict(again)
    assert again.keys() == stored.keys() == specs.keys()
    for name, array in stored.items():
        assert specs[name] == (array.shape, array.dtype)
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize(
    "entries",
    [
        [*packed("w", {"q": 2, "k": 2, "v": 2})[:2], Entry("v", "v")],  # a part is nobody's
        [Entry(name, "w") for name in "qkv"],  # whole, three times
        [Entry(name, "w", columns=Columns(0, 2, 6)) for name in "qkv"],  # the same columns
    ],
)
def test_parts_that_do_not_make_a_tensor_are_refused(entries):
    with pytest.raises(CheckpointError, match="makes w of parts that do not fit"):
        disassemble(entries, {name: np.zeros((3, 2), np.float32) for name in "qkv"})


def test_columns_that_do_not_divide_and_leaves_named_twice_are_refused():
    with pytest.raises(CheckpointError, match="cuts q from w in groups of 2 columns, and it has 3"):
        disassemble(packed("w", {"q": 2, "k": 2}), {n: np.zeros((4, 3)) for n in "qk"})
    with pytest.raises(CheckpointError, match="named twice q"):
        disassemble([Entry("q", "a"), Entry("q", "b")], {"q": np.zeros(2)})


def test_a_packed_tensor_has_room_for_its_widest_part():
    leaves = {"q": np.ones((3, 2), np.float16), "k": np.full((3, 2), 1e6, np.float32)}
    specs, tensors = disassemble(packed("w", {"q": 2, "k": 2}), leaves)
    assert specs["w"][1] == np.float32 and dict(tensors)["w"].max() == 1e6


def test_a_packed_tensor_of_another_shape_is_refused():
    stored = checkpoint({"w": np.zeros((3, 7), np.float32)})
    with pytest.raises(CheckpointError, match=r"w has shape \[3, 7\], expected \[3, 6\]"):
        assemble(stored, packed("w", {"q": 2, "k": 4}), tree(q=(3, 2), k=(3, 4)))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_on_a_mesh_every_leaf_is_read_into_its_shards(shape):
    case = FIXTURES / "tiny_llama" / "gqa"
    whole, spread = hub.load(case), hub.load(case, mesh=make_mesh(*shape))
    split = 0
    for (name, a), (_, b) in zip(
        named_leaves(whole.params), named_leaves(spread.params), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)
        split += b.addressable_shards[0].data.size < b.size
    assert split > 5
    tokens = np.arange(6)[None]
    np.testing.assert_allclose(spread.logits(tokens), whole.logits(tokens), atol=1e-5)


def test_without_a_mesh_no_leaf_is_bound_to_a_device():
    loaded = hub.load(FIXTURES / "tiny_llama" / "gqa")
    assert not any(leaf.committed for leaf in jax.tree.leaves(loaded.params))
    tokens = jax.device_put(np.zeros((8, 4), np.int32), NamedSharding(make_mesh(8), P("data")))
    assert loaded.logits(tokens).shape[:2] == (8, 4)


def test_each_shard_is_read_once_and_what_is_replicated_is_said(capsys):
    reads = []
    tensors = {"w": np.arange(24, dtype=np.float32).reshape(4, 6)}
    stored = Checkpoint(
        Path("memory"), {}, {"w": (4, 6)}, lambda name: (reads.append(name), tensors[name])[1]
    )
    home = NamedSharding(make_mesh(4, 2), P("fsdp"))  # two shards, four copies of each
    found = assemble(stored, [Entry("w", "w")], tree(w=(4, 6)), shardings={"w": home})
    np.testing.assert_array_equal(found["w"], tensors["w"])
    assert len(reads) == 2 and found["w"].sharding == home
    hub.load(FIXTURES / "tiny_llama" / "gqa", mesh=make_mesh(tensor=8))
    assert "kv_heads (2) is replicated, tensor=8 does not divide it" in capsys.readouterr().out


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(ShardingError, match=r"the mesh has the axes \['x'\]"):
        hub.load(FIXTURES / "tiny_llama" / "gqa", mesh=jax.make_mesh((8,), ("x",)))
