import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from perceptron import NAMES, assert_bitwise, objective, params, source

from research.paths import named_leaves
from research.train import paged as paging
from research.train.loop import Training, fit
from research.train.optim import AdamW, Paged
from research.train.paged import paged
from research.train.sharding import make_mesh
from research.types import Source

INNER = AdamW(0.02)
CONFIG = Paged(INNER, min_size=16)


class Stop(Exception):
    pass


def stopping(at):
    inner = source(8)

    def next_batch(state, *rest):
        if state["position"] == at:
            raise Stop
        return inner.next(state, *rest)

    return Source(inner.init, next_batch)


def kinds(state):
    """{memory kind: number of leaves} of an optimizer's state."""
    found = [leaf.sharding.memory_kind for _, leaf in named_leaves(state)]
    return {kind: found.count(kind) for kind in set(found)}


def train(optimizer, directory=None, at=None, **options):
    config = Training(steps=6, save_every=2 if directory else None, directory=directory)
    return fit(objective, stopping(at), params(), optimizer, config, **options)


@pytest.fixture(scope="module")
def plain():
    return train(INNER)


def test_stopped_and_resumed_it_ends_bitwise_where_the_inner_optimizer_does(plain, tmp_path):
    with pytest.raises(Stop):
        train(CONFIG, tmp_path, at=5)
    resumed = train(CONFIG, tmp_path)
    assert "pinned_host" not in kinds(plain.state.opt_state)
    assert kinds(resumed.state.opt_state)["pinned_host"] == 4  # two moments of two kernels
    bare = resumed.state.replace(opt_state=jax.tree.map(np.asarray, resumed.state.opt_state))
    assert_bitwise(bare, plain.state)


def test_on_a_mesh_it_is_refused():
    with pytest.raises(ValueError, match="train without a mesh"):
        train(CONFIG, mesh=make_mesh(1, 2, 1), names=NAMES)


def test_without_such_a_memory_it_moves_outside_jit_and_refuses_inside(monkeypatch):
    monkeypatch.setattr(paging, "has_host_memory", lambda: False)
    tree, inner = {"kernel": jnp.ones((8, 8))}, optax.adam(0.1)
    update = paged(inner, min_size=1)
    state, expected = update.init(tree), inner.init(tree)
    for step in range(3):
        grads = {"kernel": jnp.full((8, 8), step - 0.5)}
        moves, state = update.update(grads, state, tree)
        theirs, expected = inner.update(grads, expected, tree)
        np.testing.assert_array_equal(moves["kernel"], theirs["kernel"])
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 2 and all(isinstance(leaf, np.ndarray) for leaf in moments)
    with pytest.raises(ValueError, match="no memory of the kind 'pinned_host'"):
        jax.jit(update.init)(tree)
