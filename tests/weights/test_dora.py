"""DoRA against peft's numbers and its algebra; what all kin share is in test_lora_kin.py."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_kin

from research.paths import named_leaves
from research.weights import base, dora, lora

PATHS = (peft_kin.Q, peft_kin.DOWN, "embed/table", "head/kernel")
MAGNITUDE = "lora_magnitude_vector.default.weight"


def test_logits_and_gradients_equal_peft_for_linear_layers_and_the_embedding():
    leaves = dict(named_leaves(peft_kin.BASE.params))
    nodes = {
        path: dora.DoRA(
            leaves[path],
            **peft_kin.factors("dora", "param", path),
            magnitude=peft_kin.tensor("dora", "param", path, MAGNITUDE),
            scale=2.0,
        )
        for path in PATHS
    }
    grads, logits = peft_kin.gradients(peft_kin.put(nodes))
    peft_kin.check_logits("dora", logits)
    grads = dict(named_leaves(grads, is_leaf=base.is_weight))
    for path in PATHS:
        theirs = peft_kin.factors("dora", "grad", path)
        theirs["magnitude"] = peft_kin.tensor("dora", "grad", path, MAGNITUDE)
        for field, array in theirs.items():
            assert np.abs(array).max() > 0.01, (path, field)
            peft_kin.close(getattr(grads[path], field), array, f"{path}/{field}")


def test_dropout_equals_peft_given_its_mask(monkeypatch):
    given = {
        name.removeprefix("dropout."): array
        for name, array in peft_kin.TENSORS.items()
        if name.startswith("dropout.")
    }
    monkeypatch.setattr(dora, "dropped", lambda x, rate, call: x * given["mask"])
    w = dora.DoRA(
        given["base"].T, given["a"].T, given["b"].T, given["magnitude"], scale=2.0, dropout=0.5
    )
    y, grads = (
        base.matmul(given["x"], w),
        jax.grad(lambda w: (base.matmul(given["x"], w) ** 2).sum())(w),
    )
    peft_kin.close(y, given["y"])
    for field in ("a", "b", "magnitude"):
        peft_kin.close(getattr(grads, field), given[f"grad.{field}"].T, field)


def example(key, dropout=0.0):
    keys = jax.random.split(key, 4)
    w, a, b = (jax.random.normal(keys[n], s) for n, s in enumerate([(7, 5), (7, 3), (3, 5)]))
    return dora.DoRA(w, a, b, jax.random.uniform(keys[3], (5,)), scale=0.5, dropout=dropout)


def test_the_columns_have_the_lengths_that_magnitude_says(key):
    w = example(key)
    np.testing.assert_allclose(np.linalg.norm(w.dense(), axis=0), w.magnitude, rtol=1e-5)
    direction = w.base + 0.5 * w.a @ w.b
    cosine = (w.dense() * direction).sum(axis=0)
    np.testing.assert_allclose(cosine, w.magnitude * np.linalg.norm(direction, axis=0), rtol=1e-5)


def test_it_multiplies_from_either_side_and_takes_rows_like_its_dense_form(key):
    w = example(key)
    x, y = jax.random.normal(key, (4, 7)), jax.random.normal(key, (4, 5))
    np.testing.assert_allclose(base.matmul(x, w), x @ w.dense(), atol=1e-5)
    np.testing.assert_allclose(base.matmul_transposed(y, w), y @ w.dense().T, atol=1e-5)
    np.testing.assert_allclose(
        base.take(w, jnp.array([6, 0])), w.dense()[jnp.array([6, 0])], atol=1e-6
    )


def test_dropout_keeps_the_mean_from_either_side(key):
    w, call = example(key, dropout=0.3), base.Call(dropout=key)
    for product, size in ((base.matmul, 7), (base.matmul_transposed, 5)):
        x = jnp.broadcast_to(jnp.arange(1.0, size + 1), (20_000, size))
        got = product(x, w, call)
        assert np.std(got, axis=0).min() > 0.1
        np.testing.assert_allclose(got.mean(axis=0), product(x[0], w), atol=0.2)


def test_magnitude_at_the_length_is_lora(key):
    w = example(key)
    plain = lora.LoRA(w.base, w.a, w.b, scale=0.5)
    w = w.replace(magnitude=jnp.linalg.norm(plain.dense(), axis=0))
    np.testing.assert_allclose(w.dense(), plain.dense(), atol=1e-6)


def test_a_column_of_zeros_stays_zero_and_has_a_finite_gradient(key):
    matrix = jax.random.normal(key, (6, 4)).at[:, 1].set(0)
    params = dora.add({"x": {"kernel": matrix}}, "x/kernel", key, rank=2)
    grads = jax.grad(lambda p: (base.matmul(jnp.ones((3, 6)), p["x"]["kernel"]) ** 3).sum())(params)
    np.testing.assert_allclose(params["x"]["kernel"].dense(), matrix, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_it_stands_on_another_weight(key):
    matrix = jax.random.normal(key, (6, 4))
    inner = lora.LoRA(matrix, jnp.ones((6, 1)), jnp.ones((1, 4)), scale=1.0)
    w = dora.add({"x": {"kernel": inner}}, "x/kernel", key, rank=2)["x"]["kernel"]
    np.testing.assert_allclose(w.dense(), matrix + 1, atol=1e-6)
    assert isinstance(w.base, lora.LoRA)


def test_a_column_that_its_update_cancels_has_length_one(key):
    node = example(key)
    update = node.scale * node.a @ node.b
    cancelled = node.replace(base=node.base.at[:, 2].set(-update[:, 2]))
    lengths = dora.lengths(cancelled.base, node.a, node.b, node.scale)
    assert lengths[2] == 1
    want = jnp.linalg.norm(cancelled.base + update, axis=0)
    np.testing.assert_allclose(np.delete(lengths, 2), np.delete(want, 2), rtol=1e-5)
