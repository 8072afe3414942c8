"""Advantages and policy losses against loops, published vectors and limits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.losses import advantages as adv
from research.losses import policy

TRL = Path(__file__).parent / "fixtures" / "ppo_loss.safetensors"
NAMES = ("new_grad", "predicted_grad", "policy_loss", "value_loss")

# The vectors that trl 0.11.4's algorithm gives (gamma 1, lambda 0.95).
VALUES = jnp.array([[0.5, 0.2, -0.1, 0.3], [0.1, 0.4, 0.2, 9.0]])
REWARDS = jnp.array([[-0.01, 0.02, -0.03, 1.0], [-0.02, 0.01, 2.0, 7.0]])
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])
ADVANTAGES = [[0.3581, 0.7032, 1.0350, 0.7000], [1.7240, 1.5200, 1.8000, 0]]
RETURNS = [[0.8581, 0.9032, 0.9350, 1.0], [1.8240, 1.9200, 2.0, 0]]
WHITE = [[-1.3452, -0.7358, -0.1501, -0.7416], [1.0662, 0.7061, 1.2004, 0]]


def loop(rewards, values, lengths, gamma, lam, last):
    out = np.zeros_like(rewards)
    for b, n in enumerate(lengths):
        after, value = 0.0, last[b]
        for t in reversed(range(n)):
            delta = rewards[b, t] + gamma * value - values[b, t]
            after = delta + gamma * lam * after
            out[b, t], value = after, values[b, t]
    return out


def test_gae_has_the_published_vectors():
    advantages, returns = adv.gae(REWARDS, VALUES, MASK)
    np.testing.assert_allclose(advantages, ADVANTAGES, atol=6e-5)
    np.testing.assert_allclose(returns, RETURNS, atol=6e-5)
    np.testing.assert_allclose(adv.whiten(advantages, MASK), WHITE, atol=6e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_is_a_loop(gamma, lam, cut):
    random = np.random.default_rng(0)
    lengths = [7, 1, 5]
    rewards, values = random.normal(size=(2, 3, 7))
    mask = np.arange(7) < np.array(lengths)[:, None]
    last = random.normal(size=3) if cut else np.zeros(3)
    wanted = loop(rewards, values, lengths, gamma, lam, last)
    advantages, returns = adv.gae(
        rewards, values, mask, gamma, lam, jnp.array(last) if cut else None
    )
    np.testing.assert_allclose(advantages, wanted, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, wanted + values, 0), atol=1e-5)


def test_without_discount_it_is_the_reward_to_go_less_the_value():
    advantages, _ = adv.gae(REWARDS, VALUES, MASK, 1.0, 1.0)
    togo = adv.reward_to_go(REWARDS, MASK)
    np.testing.assert_allclose(togo, [[0.98, 0.99, 0.97, 1.0], [1.99, 2.01, 2.0, 0]], atol=1e-6)
    np.testing.assert_allclose(advantages, jnp.where(MASK == 1, togo - VALUES, 0), atol=1e-6)


def test_what_stands_between_the_steps_of_an_episode_does_not_count():
    mask = jnp.array([[1, 0, 1, 0, 0, 1, 0]])
    rewards = adv.shaped_rewards(jnp.array([0.8]), jnp.zeros((1, 7)), mask, 0.1)
    np.testing.assert_allclose(rewards, [[0, 0, 0, 0, 0, 0.8, 0]], atol=1e-7)
    values = jnp.where(mask == 1, 0.5, 7.0)
    _, returns = adv.gae(rewards, values, mask, 1.0, 1.0)
    np.testing.assert_allclose(returns, [[0.8, 0, 0.8, 0, 0, 0.8, 0]], atol=1e-6)
    spread, _ = adv.gae(rewards, values, mask, 0.9, 0.8, jnp.array([2.0]))
    dense, _ = adv.gae(
        *(x[:, [0, 2, 5]] for x in (rewards, values, mask)), 0.9, 0.8, jnp.array([2.0])
    )
    np.testing.assert_allclose(spread[:, [0, 2, 5]], dense, atol=1e-6)


def test_whitening_keeps_the_mean_where_asked_and_leaves_padding_at_zero():
    kept = adv.whiten(REWARDS, MASK, shift=False)
    assert kept[1, 3] == 0
    real = np.asarray(REWARDS)[np.asarray(MASK) == 1]
    assert adv.masked_mean(kept, MASK) == pytest.approx(real.mean(), abs=1e-6)
    assert adv.masked_variance(REWARDS, MASK) == pytest.approx(real.var(ddof=1), rel=1e-6)
    assert adv.masked_variance(REWARDS, MASK, False) == pytest.approx(real.var(), rel=1e-6)


def test_bias_and_spread_of_the_estimators():
    """Two Gaussians, KL 0.5: k2 is 25 % too large, k1 and k3 are right; spreads over the truth 2, 1.74, 1.71."""
    x = jax.random.normal(jax.random.key(0), (2_000_000,))
    policy_, reference = -jnp.square(x) / 2, -jnp.square(x - 1) / 2
    found = {k: adv.kl_estimate(policy_, reference, k) for k in ("k1", "k2", "k3")}
    means = {k: float(v.mean()) / 0.5 for k, v in found.items()}
    assert means["k1"] == pytest.approx(1, abs=0.01) and means["k3"] == pytest.approx(1, abs=0.01)
    assert means["k2"] == pytest.approx(1.249, abs=0.01)
    spreads = [float(v.std()) / 0.5 for v in found.values()]
    np.testing.assert_allclose(spreads, [2.0, 1.74, 1.71], rtol=0.03)
    assert found["k3"].min() >= 0
    with pytest.raises(ValueError, match="one of k1, k2, k3, not 'k4'"):
        adv.kl_estimate(x, x, "k4")


def test_the_score_lands_on_the_last_token():
    rewards = adv.shaped_rewards(jnp.array([5.0, -2.0]), jnp.ones((2, 4)), MASK, 0.1)
    np.testing.assert_allclose(rewards, [[-0.1, -0.1, -0.1, 4.9], [-0.1, -0.1, -2.1, 0]], atol=1e-6)


def test_groups_by_hand():
    scores = jnp.array([[1.0, 2.0, 6.0]])
    np.testing.assert_allclose(adv.leave_one_out(scores), [[-3.0, -1.5, 4.5]])
    deviation = np.std([1, 2, 6], ddof=1)
    np.testing.assert_allclose(
        adv.group_advantages(scores), [[-2 / deviation, -1 / deviation, 3 / deviation]], rtol=1e-3
    )
    np.testing.assert_allclose(adv.group_advantages(jnp.ones((2, 4))), 0)
    with pytest.raises(ValueError, match="2 answers or more"):
        adv.leave_one_out(scores[:, :1])


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [(12.0, 0.15 * (1 + 0.2 * 0.0064)), (6.0, 0.15), (5.7, 0.15 * (1 - 0.05 * 0.0064))],
)
def test_the_adaptive_coefficient_by_hand(kl, wanted):
    assert adv.adaptive_coefficient(0.15, kl, 6.0, 64) == pytest.approx(wanted, rel=1e-6)


def test_the_clipped_loss_by_hand():
    old, advantages = jnp.zeros((1, 4)), jnp.array([[1.0, 1.0, -1.0, -1.0]])
    new = jnp.log(jnp.array([[1.5, 0.5, 1.5, 0.5]]))
    loss, metrics = policy.ppo(new, old, advantages, jnp.ones((1, 4)))
    assert loss == pytest.approx(np.mean([-1.2, -0.5, 1.5, 0.8]), rel=1e-6)
    assert metrics["clip_fraction"] == 0.5 and metrics["ratio"] == pytest.approx(1.0)
    grads = jax.grad(lambda x: policy.ppo(x, old, advantages, jnp.ones((1, 4)))[0])(new)
    np.testing.assert_array_equal(np.asarray(grads)[0] != 0, [False, True, True, False])
    loss, _ = policy.ppo(new + 3, old, advantages, jnp.ones((1, 4)), dual_clip=3.0)
    assert loss == pytest.approx(np.mean([-1.2, -1.2, 3.0, 3.0]), rel=1e-6)


def test_the_first_step_has_ratio_one_and_the_gradient_of_reinforce():
    new = jnp.array([[-1.0, -2.0, -0.5]])
    advantages, mask = jnp.array([[1.0, -2.0, 3.0]]), jnp.array([[1, 1, 0]])
    loss, metrics = policy.ppo(new, new, advantages, mask)
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0 and loss == pytest.approx(0.5)
    ours = jax.grad(lambda x: policy.ppo(x, new, advantages, mask)[0])(new)
    theirs = jax.grad(lambda x: policy.reinforce(x, advantages, mask)[0])(new)
    np.testing.assert_allclose(ours, theirs)
    assert ours[0, 2] == 0


def test_values_are_clipped_and_explained():
    new, old, returns = jnp.array([[1.0, 0.1]]), jnp.zeros((1, 2)), jnp.array([[1.0, 1.0]])
    mask = jnp.ones((1, 2))
    loss, metrics = policy.values(new, old, returns, mask)
    assert (
        loss == pytest.approx(0.5 * np.mean([0.64, 0.81])) and metrics["value_clip_fraction"] == 0.5
    )
    assert policy.values(new, old, returns, mask, None)[0] == pytest.approx(
        0.5 * np.mean([0, 0.81])
    )
    truth = jnp.array([[1.0, 2.0, 3.0, 99.0]])
    mask = jnp.array([[1, 1, 1, 0]])
    assert policy.explained_variance(truth, truth, mask) == 1
    assert policy.explained_variance(jnp.full((1, 4), 2.0), truth, mask) == pytest.approx(0)


def test_bad_clips():
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"above 0 and dual_clip above 1, not 0\.0 and None"):
        policy.ppo(x, x, x, x, clip=0.0)


def test_equals_an_older_trl():
    """Values and gradients that trl 0.11.4's own functions gave (scripts/references/ppo_loss.py)."""
    v = {k: jnp.asarray(x) for k, x in load_file(str(TRL)).items()}
    advantages, returns = adv.gae(v["rewards"], v["values"], v["mask"], 0.99, 0.95)
    white = adv.whiten(advantages, v["mask"])
    np.testing.assert_allclose(white, v["advantages"], atol=2e-6)
    np.testing.assert_allclose(returns, v["returns"], atol=2e-6)

    def both(new, predicted):
        of_policy, more = policy.ppo(new, v["old"], v["advantages"], v["mask"])
        values = jnp.where(v["mask"] != 0, v["values"], 0)
        of_values, others = policy.values(predicted, values, v["returns"], v["mask"])
        return of_policy + 0.1 * of_values, (of_policy, of_values, more | others)

    grads, found = jax.grad(both, (0, 1), has_aux=True)(v["new"], v["predicted"])
    for ours, name in zip((*grads, *found[:2]), NAMES, strict=True):
        np.testing.assert_allclose(ours, v[name], atol=2e-6)
    for name in ("approximate_kl", "clip_fraction", "value_clip_fraction"):
        np.testing.assert_allclose(found[2][name], v[name], atol=2e-6)
    entropy = -(jax.nn.softmax(v["logits"]) * jax.nn.log_softmax(v["logits"])).sum(-1)
    np.testing.assert_allclose(adv.masked_mean(entropy, v["mask"]), v["entropy"], atol=2e-6)
