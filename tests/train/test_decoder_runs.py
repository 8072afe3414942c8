"""The loop with the real decoder: LoRA, packing weights, meshes, and a checkpoint of Weights."""

import jax
import numpy as np
import pytest

from research.models import decoder
from research.models.families.llama import llama
from research.objectives import next_token
from research.paths import named_leaves
from research.train.loop import Training, fit
from research.train.optim import SGD, AdamW
from research.train.sharding import make_mesh
from research.types import Source
from research.weights import lora
from research.weights.base import is_weight

MODEL = decoder.Decoder(llama(64, 2, 16, 4, 2, 32, max_length=32))
FACTORS = r".*/kernel/(a|b)"


def adapted():
    tree = decoder.init(MODEL, jax.random.key(0))
    return lora.add(tree, r".*/(q|v|up)/kernel", jax.random.key(1), rank=2)


def names():
    return jax.tree.map(
        lambda weight, axes: weight.axes(axes) if is_weight(weight) else axes,
        adapted(),
        decoder.axes(MODEL),
        is_leaf=is_weight,
    )


def next_batch(state, params, context, rng, last_metrics):
    rng = np.random.default_rng(state)
    tokens = rng.integers(1, 64, size=(8, 12)).astype(np.int32)
    weights = (rng.uniform(size=(8, 11)) < 0.4).astype(np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights / weights.sum()}
    return {**batch, "segment_ids": np.ones((8, 11), np.int32)}, state + 1


def train(steps=3, directory=None, mesh=None):
    config = Training(steps=steps, accumulate=2, directory=directory)
    optimizer = AdamW(0.01, weight_decay=0.1)
    objective, source = next_token(MODEL), Source(lambda rng: 0, next_batch)
    options = {} if mesh is None else {"mesh": mesh, "names": names()}
    return fit(objective, source, adapted(), optimizer, config, rule=FACTORS, **options)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Three steps, the last after a restart."""
    directory = tmp_path_factory.mktemp("resumed")
    train(2, directory)
    return train(3, directory)


def test_only_factors_move_and_only_they_have_state(resumed):
    before = dict(named_leaves(adapted()))
    for name, leaf in named_leaves(resumed.params):
        moved = not np.array_equal(leaf, before[name])
        assert moved == name.endswith(("/kernel/a", "/kernel/b")), name
    moments = [name for name, leaf in named_leaves(resumed.state.opt_state) if leaf.ndim]
    assert moments and all(name.endswith(("/a", "/b")) for name in moments)


def test_weights_come_back_from_a_checkpoint_as_weights(resumed):
    nodes = jax.tree.leaves(resumed.state.trainable, is_leaf=is_weight)
    assert nodes and all(isinstance(node, lora.LoRA) and node.base is None for node in nodes)


def test_a_mesh_of_all_three_axes_equals_one_device(resumed):
    fitted = train(mesh=make_mesh(2, 2, 2))
    for (name, got), (_, expected) in zip(
        named_leaves(fitted.params), named_leaves(resumed.params), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)


def packed_batch(state, params, context, rng, last_metrics):
    """Rows of two or three segments and padding; no loss on padding or across a border."""
    batch, after = next_batch(state, params, context, rng, last_metrics)
    lengths = [(5, 6, 0), (3, 4, 2), (4, 4, 3), (2, 8, 0)] * 2
    segments = [np.repeat([1, 2, 3, 0], (*row, 11 - sum(row))) for row in lengths]
    segments = np.stack(segments).astype(np.int32)
    same = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
    weights = (same & (segments != 0)).astype(np.float32)
    return {**batch, "segment_ids": segments, "weights": weights / weights.sum()}, after


def train_whole(mesh=None):
    tree = decoder.init(MODEL, jax.random.key(0))
    options = {} if mesh is None else {"mesh": mesh, "names": decoder.axes(MODEL)}
    options |= {} if mesh is None else {"units": {"heads": 4, "kv_heads": 4}}
    config, where = Training(steps=2, accumulate=2), Source(lambda rng: 0, packed_batch)
    return fit(next_token(MODEL), where, tree, SGD(0.5), config, **options).params


@pytest.fixture(scope="module")
def whole():
    return train_whole()


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (1, 1, 2)])
def test_packed_full_fine_tuning_on_a_pure_mesh_equals_one_device(whole, shape):
    start = dict(named_leaves(decoder.init(MODEL, jax.random.key(0))))
    for (name, got), (_, expected) in zip(
        named_leaves(train_whole(make_mesh(*shape))), named_leaves(whole), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=name)
        assert np.abs(expected - start[name]).max() > 2e-5, name
