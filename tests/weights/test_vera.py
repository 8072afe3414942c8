"""VeRA against peft's numbers, given its projections, and its own projections."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import peft_kin
import pytest

from research.paths import named_leaves
from research.weights import base, vera

PATHS = (peft_kin.Q, peft_kin.DOWN)


@dataclass(frozen=True)
class Peft:
    """The leading parts of peft's one pair."""

    def __call__(self, inner, outer, rank):
        a, b = (peft_kin.TENSORS[f"vera.param.base_model.vera_{part}.default"].T for part in "AB")
        assert rank == a.shape[1] == b.shape[0]
        return jnp.asarray(a[:inner]), jnp.asarray(b[:, :outer])


def vectors(kind, path):
    return {
        field: peft_kin.tensor("vera", kind, path, f"vera_lambda_{field}.default") for field in "db"
    }


def test_logits_and_gradients_equal_peft_given_its_projections():
    leaves = dict(named_leaves(peft_kin.BASE.params))
    nodes = {
        path: vera.VeRA(leaves[path], **vectors("param", path), projections=Peft())
        for path in PATHS
    }
    grads, logits = peft_kin.gradients(peft_kin.put(nodes))
    peft_kin.check_logits("vera", logits)
    grads = dict(named_leaves(grads, is_leaf=base.is_weight))
    for path in PATHS:
        for field, array in vectors("grad", path).items():
            assert np.abs(array).max() > 0.01, (path, field)
            peft_kin.close(getattr(grads[path], field), array, f"{path}/{field}")


def example(key, **how):
    params = {"x": {"kernel": jax.random.normal(key, (7, 5))}}
    w = vera.add(params, "x/kernel", key, rank=4, **how)["x"]["kernel"]
    return w.replace(d=jnp.arange(1.0, 5), b=jnp.arange(5.0) - 1)


def test_it_multiplies_from_either_side_like_its_dense_form(key):
    w = example(key)
    a, b = w.projections(7, 5, 4)
    want = w.base + a @ jnp.diag(w.d) @ b @ jnp.diag(w.b)
    x, y = jax.random.normal(key, (4, 7)), jax.random.normal(key, (4, 5))
    np.testing.assert_allclose(w.dense(), want, atol=1e-4)
    np.testing.assert_allclose(base.matmul(x, w), x @ want, atol=1e-4)
    np.testing.assert_allclose(base.matmul_transposed(y, w), y @ want.T, atol=1e-4)


def test_projections_are_shared_by_shape_and_follow_the_seed():
    draw = vera.Drawn(3)
    a, b = draw(40, 30, 8)
    same_a, other_b = draw(40, 20, 8)
    np.testing.assert_array_equal(a, same_a)
    assert other_b.shape == (8, 20) and b.shape == (8, 30)
    np.testing.assert_array_equal(b, draw(20, 30, 8)[1])
    np.testing.assert_array_equal(jax.jit(draw, static_argnums=(0, 1, 2))(40, 30, 8)[0], a)
    assert np.abs(a - vera.Drawn(4)(40, 30, 8)[0]).max() > 0.1
    assert draw(8, 8, 8)[0][0, 0] != draw(8, 8, 8)[1][0, 0]


def test_projections_are_of_kaimings_size():
    """Variance 2 / fan_in on either side."""
    a, b = vera.Drawn()(300, 200, 50)
    np.testing.assert_allclose(a.var() * 300, 2, rtol=0.03)
    np.testing.assert_allclose(b.var() * 50, 2, rtol=0.03)
    assert np.abs(a).max() <= (6 / 300) ** 0.5


def test_two_keys_give_other_projections_and_one_the_same(key):
    first, again, other = example(key), example(key), example(jax.random.key(1))
    assert first.projections == again.projections != other.projections


def test_only_vectors_are_parameters(key):
    """The paper's count: R + out for a matrix."""
    names = {name: leaf.size for name, leaf in named_leaves({"kernel": example(key)})}
    assert names == {"kernel/base": 35, "kernel/d": 4, "kernel/b": 5}


def test_dropout_touches_the_branch_only(key):
    w, call = example(key, dropout=0.5), base.Call(dropout=jax.random.key(1))
    x = jnp.ones((20_000, 7))
    dropped = base.matmul(x, w, call)
    np.testing.assert_array_equal(dropped[:, 1], base.matmul(x, w)[:, 1])  # b is 0 there
    assert dropped[:, 2].std() > 0.1
    np.testing.assert_allclose(dropped.mean(axis=0), base.matmul(x[0], w), atol=1.0)


def test_tables_and_ranks_below_one_are_refused(key):
    params = {"embed": {"table": jnp.ones((4, 3))}, "x": {"kernel": jnp.ones((4, 3))}}
    with pytest.raises(ValueError, match="not on an embedding table: embed/table"):
        vera.add(params, "embed/table", key)
    with pytest.raises(ValueError, match="rank of at least 1, not 0"):
        vera.add(params, "x/kernel", key, rank=0)
