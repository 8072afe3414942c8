import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from perceptron import NAMES, Factored, factored, objective, params, source

from research.paths import named_leaves
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.sharding import (
    ShardingError,
    follow,
    make_mesh,
    shard_batch,
    sharded_init,
    sharding_of,
    shardings,
)

STEPS = 4


def train(mesh=None, tree=None, names=NAMES, steps=STEPS, **options):
    tree = params() if tree is None else tree
    config = Training(steps=steps, accumulate=2, ema_decay=0.9, **options)
    optimizer = AdamW(0.05, weight_decay=0.1)
    names = None if mesh is None else names
    return fit(objective, source(16), tree, optimizer, config, mesh=mesh, names=names)


@pytest.fixture(scope="module")
def alone():
    return train()


MESHES = [(8, 1, 1), (1, 4, 1), (1, 1, 8), (2, 2, 2)]


@pytest.mark.parametrize("shape", MESHES)
def test_any_mesh_equals_one_device(alone, shape):
    mesh = make_mesh(*shape)
    fitted = train(mesh)
    for (name, got), (_, expected) in zip(
        named_leaves((fitted.state.trainable, fitted.state.opt_state, fitted.state.ema)),
        named_leaves((alone.state.trainable, alone.state.opt_state, alone.state.ema)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5, err_msg=name)
        assert got.sharding.mesh == mesh
    spec = fitted.params["hidden"]["kernel"].sharding.spec
    wanted = [axis if mesh.shape[axis] > 1 else None for axis in ("fsdp", "tensor")]
    assert [*spec, None, None][:2] == wanted
    homes = {name: leaf.sharding for name, leaf in named_leaves(fitted.state.opt_state)}
    assert any("mu/hidden/kernel" in name for name in homes)
    for name, home in homes.items():
        if "hidden/kernel" in name:
            assert home.is_equivalent_to(fitted.params["hidden"]["kernel"].sharding, 2)


def test_resumes_into_its_shards(alone, tmp_path, capsys):
    mesh = make_mesh(2, 2, 2)
    stopped = train(mesh, directory=tmp_path, steps=2)
    again = train(mesh, directory=tmp_path)
    assert "resumed from step 2" in capsys.readouterr().out
    for part in ("trainable", "opt_state", "ema"):
        resumed, before = getattr(again.state, part), getattr(stopped.state, part)
        assert sharding_of(resumed) == sharding_of(before)
        for (name, got), (_, expected) in zip(
            named_leaves(resumed), named_leaves(getattr(alone.state, part)), strict=True
        ):
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5, err_msg=name)


def test_fit_keeps_units_whole(capsys):
    fitted = fit(
        objective,
        source(16),
        params(),
        AdamW(0.05),
        Training(steps=1),
        mesh=make_mesh(tensor=2),
        names=NAMES,
        units={"ffn": 8},
    )
    assert "hidden/kernel: ffn (1) is replicated" in capsys.readouterr().out
    assert fitted.params["hidden"]["kernel"].sharding.is_fully_replicated


def test_names_reach_inside_a_weight():
    mesh = make_mesh(2, 2, 2)
    kernel = Factored(("embed", "ffn"), ("embed", "rank"), ("rank", "ffn"))
    names = {**NAMES, "hidden": {**NAMES["hidden"], "kernel": kernel}}
    placed, notes = shardings(names, jax.eval_shape(factored), mesh)
    assert not notes and type(placed["hidden"]["kernel"]) is Factored
    specs = {name: tuple(home.spec) for name, home in named_leaves(placed)}
    assert specs["hidden/kernel/base"] == ("fsdp", "tensor")
    assert specs["hidden/kernel/a"] == ("fsdp", None)
    assert specs["hidden/kernel/b"] == (None, "tensor")
    tree = sharded_init(factored, names, mesh)
    for (name, leaf), (_, plain) in zip(named_leaves(tree), named_leaves(factored()), strict=True):
        assert leaf.sharding.is_equivalent_to(dict(named_leaves(placed))[name], leaf.ndim)
        np.testing.assert_allclose(leaf, plain, rtol=1e-6, atol=1e-7)
    assert tree["hidden"]["kernel"].base.addressable_shards[0].data.shape == (2, 4)


def test_an_axis_that_does_not_divide_is_replicated_and_said():
    mesh = make_mesh(tensor=2)
    names = {"q": ("embed", "heads"), "k": ("embed", "kv_heads")}
    abstract = {"q": jnp.zeros((6, 576)), "k": jnp.zeros((6, 3))}
    placed, notes = shardings(names, abstract, mesh, units={"heads": 64})
    assert tuple(placed["q"].spec) == (None, None) and tuple(placed["k"].spec) == (None, None)
    assert notes == [
        "k: kv_heads (3) is replicated, tensor=2 does not divide it",
        "q: heads (9) is replicated, tensor=2 does not divide it",
    ]
    whole, _ = shardings(names, abstract, mesh)
    assert tuple(whole["q"].spec) == (None, "tensor")


def test_bad_names_are_errors():
    mesh = make_mesh(tensor=2)
    with pytest.raises(ShardingError, match="q: no sharding rule for axis 'head'"):
        shardings({"q": ("embed", "head")}, {"q": jnp.zeros((2, 2))}, mesh)
    with pytest.raises(ShardingError, match=r"q: 1 axis names .* for shape \(2, 2\)"):
        shardings({"q": ("embed",)}, {"q": jnp.zeros((2, 2))}, mesh)
    with pytest.raises(ShardingError, match="needs 16 devices; there are 8"):
        make_mesh(data=4, tensor=4)


def test_a_mesh_that_does_not_divide_the_batch_is_an_error():
    mesh = make_mesh(data=2, fsdp=2)
    with pytest.raises(
        ShardingError, match=r"has 12 rows; .* data=2, fsdp=2 with 2 .* multiple of 8"
    ):
        shard_batch({"tokens": np.zeros((12, 3))}, mesh, accumulate=2)
    placed = shard_batch({"tokens": np.zeros((16, 3)), "beta": np.float32(1)}, mesh, accumulate=2)
    assert placed["tokens"].addressable_shards[0].data.shape == (4, 3)
    assert placed["beta"].sharding.is_fully_replicated


def test_optimizer_state_follows_the_longest_path_of_the_same_shape():
    mesh = make_mesh(fsdp=2, tensor=2)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    other = NamedSharding(mesh, PartitionSpec("tensor"))
    tree = {
        "kernel": jax.device_put(jnp.zeros(4), other),
        "a": {"kernel": jax.device_put(jnp.zeros(4), split)},
    }
    state = {"mu": tree, "row": {"a": {"kernel": jnp.zeros(2)}}, "count": jnp.zeros(())}
    homes = follow(state, tree, mesh)
    assert homes["mu"]["a"]["kernel"] == split and homes["mu"]["kernel"] == other
    assert homes["row"]["a"]["kernel"].is_fully_replicated and homes["count"].is_fully_replicated
