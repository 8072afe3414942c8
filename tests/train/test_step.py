import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from perceptron import assert_bitwise, factored, objective, params, predict, rows

from research.train.optim import SGD, AdamW, optimizer
from research.train.partition import combine, partition
from research.train.state import initial_state
from research.train.step import accumulated_gradients, make_step, split_batch
from research.types import Mean


def two_terms(tree, context, batch, rng):
    """Two losses with different denominators: tokens that count, and rows that count."""
    errors = jnp.square(predict(tree, batch["x"]) - batch["y"])
    first = (errors[:, 0] * batch["first"]).sum()
    second = (jnp.abs(errors[:, 1]) * batch["second"]).sum()
    return first + context["mix"] * second, {"first": Mean.of(errors[:, 0], batch["first"])}


def ragged(batch=24):
    made = rows(0, 0, batch)
    rng = np.random.default_rng(1)
    first = (np.arange(batch) < 5).astype(np.float32) * rng.uniform(size=batch).astype(np.float32)
    second = (rng.uniform(size=batch) < 0.3).astype(np.float32)
    return {
        "x": made["x"],
        "y": made["y"],
        "first": first / first.sum(),
        "second": second / second.sum(),
    }


@pytest.mark.parametrize("accumulate", [2, 4, 24])
def test_ragged_micro_batches_give_the_gradient_of_the_whole_batch(key, accumulate):
    trainable, frozen = partition(params(), ".*")
    context, batch = {"mix": jnp.float32(0.7)}, ragged()
    state = initial_state(trainable, optax.sgd(0.1), key)
    (loss, _), whole = jax.value_and_grad(
        lambda tree: two_terms(tree, context, batch, key), has_aux=True
    )(trainable)
    got, metrics, grads = accumulated_gradients(
        two_terms, state, frozen, context, split_batch(batch, accumulate), accumulate
    )
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["first"].count, 1.0, rtol=1e-5)


def test_each_micro_batch_and_step_has_its_own_key(key):
    def draws(tree, context, batch, rng):
        return tree["w"] * jax.random.normal(rng), {}

    tree = {"w": jnp.float32(1.0)}
    state = initial_state(tree, optax.sgd(0.1), key)
    for step in (0, 5):
        at = state.replace(step=jnp.int32(step))
        _, _, grads = accumulated_gradients(
            draws, at, {"w": None}, None, {"x": jnp.zeros((3, 1))}, 3
        )
        base = jax.random.fold_in(key, step)
        slow = sum(jax.random.normal(jax.random.fold_in(base, micro)) for micro in range(3))
        np.testing.assert_allclose(grads["w"], slow, rtol=1e-6)


def test_frozen_leaves_are_bitwise_unchanged_and_context_survives(key):
    tree = factored()
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)
    trainable, frozen = partition(tree, r".*/kernel/(a|b)")
    update = optimizer(AdamW(0.1, weight_decay=0.1), trainable)
    state = initial_state(trainable, update, key, ema=True)
    step = make_step(objective, update, accumulate=2, ema_decay=0.9)
    context = {"reference": trainable}  # the caller's own arrays: never donated
    for index in range(3):
        state, _ = step(state, frozen, context, rows(0, index))
    after = combine(state.trainable, frozen)
    assert_bitwise(after["hidden"]["kernel"].base, before["hidden"]["kernel"].base)
    assert_bitwise((after["out"], after["norm"]), (before["out"], before["norm"]))
    assert not np.array_equal(after["hidden"]["kernel"].a, before["hidden"]["kernel"].a)
    assert_bitwise(tree, jax.tree.map(jnp.asarray, before))


def test_moving_average_equals_a_slow_form(key):
    trainable, frozen = partition(params(), ".*")
    update = optimizer(SGD(0.3), trainable)
    state = initial_state(trainable, update, key, ema=True)
    step = make_step(objective, update, ema_decay=0.8)
    slow = np.asarray(trainable["out"]["kernel"], np.float64)
    for index in range(4):
        state, _ = step(state, frozen, None, rows(0, index))
        slow = 0.8 * slow + 0.2 * np.asarray(state.trainable["out"]["kernel"], np.float64)
    np.testing.assert_allclose(state.ema["out"]["kernel"], slow, rtol=1e-5)


def test_reported_norms_and_rate(key):
    trainable, frozen = partition(params(), ".*")
    update = optimizer(SGD(0.25, clip_norm=None), trainable)
    state = initial_state(trainable, update, key)
    moved, metrics = make_step(objective, update)(state, frozen, None, rows(0, 0))
    value = {name: float(mean.value) for name, mean in metrics.items()}
    assert value["lr"] == 0.25
    assert value["update_norm"] == pytest.approx(0.25 * value["grad_norm"], rel=1e-5)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moved.trainable)])
    assert value["param_norm"] == pytest.approx(float(np.linalg.norm(flat)), rel=1e-5)
    assert value["loss"] == pytest.approx(value["error"], rel=1e-5)
    assert int(moved.step) == 1


def test_tokens_are_counted_without_padding(key):
    def nothing(tree, context, batch, rng):
        return tree["w"] * 0.0, {}

    state = initial_state({"w": jnp.float32(1.0)}, optax.sgd(0.1), key)
    batch = {
        "tokens": jnp.ones((2, 4), jnp.int32),
        "segment_ids": jnp.array([[1, 1, 2, 0], [1, 0, 0, 0]]),
    }
    _, metrics = make_step(nothing, optax.sgd(0.1), accumulate=2)(state, {"w": None}, None, batch)
    assert float(metrics["input_tokens"].total) == 4


def test_an_objective_may_report_its_own_loss_but_not_our_names(key):
    def named(name):
        def per_token(tree, context, batch, rng):
            return tree["w"] * 3.0, {name: Mean(tree["w"] * 8.0, jnp.float32(4.0))}

        state = initial_state({"w": jnp.float32(1.0)}, optax.sgd(0.1), key)
        return make_step(per_token, optax.sgd(0.1))(
            state, {"w": None}, None, {"x": jnp.zeros((2, 1))}
        )

    _, metrics = named("loss")
    assert float(metrics["loss"].value) == 2.0 and float(metrics["objective"].value) == 3.0
    with pytest.raises(ValueError, match=r"\['grad_norm'\], which the step reports itself"):
        named("grad_norm")


def test_a_batch_that_does_not_split_is_an_error(key):
    trainable, frozen = partition(params(), ".*")
    state = initial_state(trainable, optax.sgd(0.1), key)
    with pytest.raises(ValueError, match="has 8 rows, which do not split into 3 micro-batches"):
        make_step(objective, optax.sgd(0.1), accumulate=3)(state, frozen, None, rows(0, 0))


def test_optimizers_with_extra_arguments_get_them(key):
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return jax.tree.map(lambda p, a: a - p, params, extra["context"]["anchor"]), state

    spring = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    trainable, frozen = partition(params(), ".*")
    anchor = params(seed=9)
    state = initial_state(trainable, spring, key)
    state, _ = make_step(objective, spring)(state, frozen, {"anchor": anchor}, rows(0, 0))
    assert set(seen) == {"value", "grad", "step", "rng", "frozen", "context", "batch"}
    np.testing.assert_allclose(state.trainable["out"]["kernel"], anchor["out"]["kernel"], atol=1e-6)


def test_a_bad_step_leaves_the_state_as_it_was(key):
    trainable, frozen = partition(params(), ".*")
    update = optimizer(AdamW(0.1), trainable)
    step = make_step(objective, update)
    state, _ = step(initial_state(trainable, update, key), frozen, None, rows(0, 0))
    before = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    batch = rows(0, 1)
    batch["x"][3, 2] = np.nan
    state, metrics = step(state, frozen, None, batch)
    assert np.isnan(float(metrics["loss"].value))
    assert_bitwise(state, before)


def test_runs_without_jit(key):
    trainable, frozen = partition(params(), ".*")
    update = optimizer(AdamW(0.1), trainable)
    with jax.disable_jit():
        state = initial_state(trainable, update, key)
        state, metrics = make_step(objective, update, accumulate=2)(state, frozen, None, rows(0, 0))
    assert int(state.step) == 1 and np.isfinite(float(metrics["loss"].value))


def test_a_bad_update_of_a_good_gradient_leaves_the_state_as_it_was(key):
    bad = optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: leaf * np.inf, updates))
    trainable, frozen = partition(params(), ".*")
    state = initial_state(trainable, bad, key)
    before = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    state, metrics = make_step(objective, bad)(state, frozen, None, rows(0, 0))
    assert np.isfinite(float(metrics["grad_norm"].value))
    assert_bitwise(state, before)
