"""Training with rollouts: bitwise resume, no recompilation, early stop, adapted numbers, TRPO, control."""

import dataclasses
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_policy import MODEL, SETTINGS, TASK, first, source, start

from research.decode.generate import advance, read
from research.kernels.flash2 import flash2
from research.losses.advantages import adaptive_coefficient, masked_mean
from research.objectives import states
from research.rl import control, trpo
from research.rl.advantage import Estimator
from research.rl.objective import Loss, policy_gradient
from research.rl.policy import without_critic
from research.rl.rate import scaled_by_batch
from research.rl.source import Rollouts, rollout_source
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.types import Mean, Source

LOSS = Loss(entropy_weight=0.01)


def train(steps, directory=None, stop_at=None, objective=None):
    inner = source()

    def next_batch(state, *rest):
        if int(state["step"]) == stop_at:
            raise KeyboardInterrupt
        return inner.next(state, *rest)

    return fit(
        objective or policy_gradient(MODEL, LOSS),
        Source(inner.init, next_batch),
        start(),
        AdamW(1e-2, weight_decay=0.0),
        Training(steps, log_every=None, save_every=directory and 3, seed=5, directory=directory),
        context={"reference": start(1, critic=False)},
    )


def test_a_run_that_was_cut_off_in_an_epoch_goes_on_bitwise(tmp_path):
    whole = train(10)
    with pytest.raises(KeyboardInterrupt):
        train(10, tmp_path / "run", stop_at=8)
    resumed = train(10, tmp_path / "run")
    for a, b in (
        (whole.params, resumed.params),
        (whole.state.source_state, resumed.state.source_state),
    ):
        assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_nothing_is_compiled_twice():
    train(5)
    traced = []
    counted = policy_gradient(MODEL, LOSS)

    def objective(*args):
        traced.append(1)
        return counted(*args)

    before = read._cache_size(), advance._cache_size()
    train(13, objective=objective)
    assert (read._cache_size(), advance._cache_size()) == before
    assert len(traced) == 1


def test_an_iteration_has_each_row_once_an_epoch():
    params, context, batch, state = first()
    made, seen = source(), [batch]
    for _ in range(3):
        batch, state = made.next(state, params, context, jax.random.key(0), {})
        seen.append(batch)
    assert int(state["iteration"]) == 0 and int(state["place"]) == 4
    for epoch in (seen[:2], seen[2:]):
        rows = np.concatenate([b["log_probs"] for b in epoch])
        whole = state["rollout"]["log_probs"]
        np.testing.assert_array_equal(np.sort(rows.sum(1)), np.sort(whole.sum(1)))
    assert all(b["weights"].sum() == pytest.approx(1) for b in seen)


def metrics(kl):
    return {"approximate_kl": Mean(jnp.asarray(kl), jnp.ones([]))}


def test_too_far_from_the_sampling_policy_ends_the_iteration():
    settings = dataclasses.replace(SETTINGS, stop_kl=0.1)
    params, context, _, state = first(settings)
    made = source(settings)
    _, near = made.next(state, params, context, jax.random.key(0), metrics(0.05))
    assert int(near["iteration"]) == 0 and int(near["place"]) == 2
    _, far = made.next(state, params, context, jax.random.key(0), metrics(0.2))
    assert int(far["iteration"]) == 1 and int(far["place"]) == 1


def test_the_learning_rate_follows_the_kl():
    settings = dataclasses.replace(SETTINGS, lr_kl=0.1)
    params, context, _, state = first(settings)
    made = source(settings)
    _, state = made.next(state, params, context, jax.random.key(0), metrics(0.0))
    assert state["lr_scale"] == 1  # the first minibatch is the sampling policy's own
    for kl, scale in ((0.3, 1 / 1.5), (0.1, 1.0), (0.01, 1.5)):
        batch, _ = made.next(state, params, context, jax.random.key(0), metrics(kl))
        assert batch["rollout/lr_scale"] == pytest.approx(scale)
    updates, _ = scaled_by_batch().update({"x": jnp.ones(2)}, optax.EmptyState(), batch=batch)
    np.testing.assert_allclose(updates["x"], 1.5)


def test_the_coefficient_follows_the_kl_of_an_answer():
    settings = dataclasses.replace(SETTINGS, target_kl=0.01, horizon=100)
    _, _, batch, state = first(settings)
    wanted = adaptive_coefficient(0.1, float(batch["rollout/kl"]), 0.01, 8, 100)
    assert state["coefficient"] == pytest.approx(float(wanted)) != pytest.approx(0.1)


def test_an_answer_without_an_end_is_penalised():
    plain = first()[3]["rollout"]
    fined = first(dataclasses.replace(SETTINGS, missing_end=0.5))[3]["rollout"]
    lost = (plain["rewards"] - fined["rewards"]).sum(1)
    np.testing.assert_allclose(lost, 0.5 * (1 - plain["ended"]), atol=1e-6)
    assert 0 < plain["ended"].mean() < 1


def test_pretraining_rows_come_along():
    ids = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    rows = {"tokens": ids, "targets": ids, "weights": np.full((2, 8), 1 / 16, np.float32)}
    params, context, batch, _ = first(pretraining=lambda step: rows)
    one, more = policy_gradient(MODEL, Loss())(params, context, batch, None)
    two, _ = policy_gradient(MODEL, Loss(pretrain_weight=2.0))(params, context, batch, None)
    assert float(two - one) == pytest.approx(2 * float(more["pretrain_loss"].value), rel=1e-4)


def test_micro_batches_add_up():
    params, context, batch, _ = first(dataclasses.replace(SETTINGS, minibatches=1))
    objective = policy_gradient(MODEL, LOSS)
    grad = jax.jit(jax.grad(lambda p, b: objective(p, context, b, None)[0]))
    whole = grad(params, batch)
    halves = [
        grad(params, {k: v[i : i + 4] if np.ndim(v) else v for k, v in batch.items()})
        for i in (0, 4)
    ]
    added = jax.tree.map(jnp.add, *halves)
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(added)[0], jax.flatten_util.ravel_pytree(whole)[0], atol=1e-5
    )


@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
def test_the_gradient_is_the_policy_gradient_at_first(kind):
    params, context, batch, _ = first(dataclasses.replace(SETTINGS, minibatches=1))
    loss = Loss(kind, value_weight=0.0)
    ours = jax.grad(lambda p: policy_gradient(MODEL, loss)(p, context, batch, None)[0])(params)

    def by_hand(p):
        p = without_critic(p)
        logits = MODEL.apply({"params": p}, states(MODEL, p, batch), method="project") / 0.7
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[
            ..., 0
        ]
        return masked_mean(-batch["advantages"] * own, batch["mask"])

    theirs = jax.grad(by_hand)(params)
    np.testing.assert_allclose(
        ours["embed"]["table"], theirs["embed"]["table"], atol=1e-6, rtol=1e-4
    )


def test_conjugate_gradients_solve():
    random = np.random.default_rng(0).normal(size=(5, 5))
    matrix, b = random @ random.T + np.eye(5), np.arange(5.0)
    found = trpo.conjugate_gradients(lambda x: jnp.asarray(matrix) @ x, jnp.asarray(b), 20)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, b), atol=1e-3)


def test_a_trust_region_step_stays_inside_and_lowers_the_loss():
    settings = Rollouts(prompts=8, epochs=1, estimator=Estimator("baseline"), temperature=0.7)
    params = start(critic=False)
    likes_low = TASK._replace(score=lambda ts: np.array([-np.mean(t.ids) for t in ts]))
    made = rollout_source(MODEL, likes_low, settings)
    batch, _ = made.next(made.init(jax.random.key(0)), params, None, jax.random.key(0), {})
    loss = Loss(clip=1e6, value_weight=0.0)

    def value(p):
        return policy_gradient(MODEL, loss)(p, None, batch, None)[0]

    # A GPU's kernel, which has no second derivative.
    config = dataclasses.replace(MODEL.config, attend=partial(flash2, interpret=True))
    rule = trpo.trpo(MODEL.clone(config=config), max_kl=0.01)
    frozen = jax.tree.map(lambda x: None, params)
    step, state = jax.jit(lambda g, p: rule.update(g, rule.init(p), p, frozen=frozen, batch=batch))(
        jax.grad(value)(params), params
    )
    moved = optax.apply_updates(params, step)
    old, new = (trpo._log_p(MODEL, p, batch) for p in (params, moved))
    kl = masked_mean((jnp.exp(old) * (old - new)).sum(-1), batch["mask"])
    assert 0.002 < kl <= 0.01 and value(moved) < value(params) and int(state["refused"]) == 0


def test_cartpole_gets_better():
    model, returns = control.ActorCritic(2, 16), []
    params = model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    settings = Rollouts(prompts=4, epochs=4, estimator=Estimator("gae", gamma=0.99))
    made = control.control_source(
        model,
        lambda: gymnasium.make("CartPole-v1"),
        settings,
        60,
        lambda i, r: returns.append(r.mean()),
    )
    loss = Loss(value_weight=0.5, value_clip=None)
    fit(
        control.control_objective(model, loss),
        made,
        params,
        AdamW(1e-2, weight_decay=0.0),
        Training(4 * 12, log_every=None),
    )
    assert len(returns) == 12 and np.mean(returns[-3:]) > 1.5 * np.mean(returns[:3])


def test_control_takes_no_settings_of_text():
    with pytest.raises(ValueError, match="no kl"):
        control.control_source(control.ActorCritic(2), lambda: None, Rollouts(kl=0.1), 10)


def test_an_episode_that_is_cut_off_goes_on_in_the_critic():
    model = control.ActorCritic(2, 8)
    params = model.init(jax.random.key(1), jnp.zeros((1, 4)))["params"]
    made = [gymnasium.make("CartPole-v1") for _ in range(3)]
    batch, last = control.episodes(model, params, made, 5, 0, jax.random.key(0))
    assert (batch["mask"] == 1).all() and (last != 0).all()  # nobody falls in 5 steps
    batch, last = control.episodes(model, params, made, 200, 0, jax.random.key(0))
    assert (batch["mask"].sum(1) < 200).all() and (last == 0).all()
    assert (batch["rewards"] == batch["mask"]).all()
