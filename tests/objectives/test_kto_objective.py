"""KTO bound to a model: against its formula, at the reference, and what its reference point is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from judged_rows import INIT, MODEL, answers

from research.objectives import answer_log_probs, kto
from research.objectives.reference import in_context

GRADS = jax.jit(
    lambda objective, params, context, batch: jax.value_and_grad(objective, has_aux=True)(
        params, context, batch, None
    ),
    static_argnums=0,
)


@pytest.fixture(scope="module")
def policy():
    return INIT(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def other():
    return INIT(MODEL, jax.random.key(1))


def by_hand(params, batch, reference, good_weight, bad_weight, beta=0.3):
    sums, _ = answer_log_probs(MODEL, params, batch)
    ratios = sums - reference
    z0 = max(0.0, float(ratios[:, 1].mean()))
    good = good_weight * (1 - jax.nn.sigmoid(beta * (ratios[:, 0] - z0)))
    bad = bad_weight * (1 - jax.nn.sigmoid(beta * (z0 - ratios[:, 0])))
    return jnp.where(batch["good"], good, bad).mean(), z0


@pytest.mark.parametrize("swap", [False, True])
def test_kto_is_its_formula_and_z0_has_no_gradient(policy, other, swap):
    """`by_hand` takes z₀ as a number, so equal gradients say that none flows through it."""
    policy, other = (other, policy) if swap else (policy, other)
    batch = answers()
    batch["reference"], _ = answer_log_probs(MODEL, other, batch)
    wanted, z0 = by_hand(policy, batch, batch["reference"], 1.2, 0.8)
    hand = jax.grad(lambda p: by_hand_traced(p, batch, z0))(policy)
    (value, metrics), grads = GRADS(kto(MODEL, 0.3, 1.2, 0.8), policy, None, batch)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["z0"].value, z0, rtol=1e-4, atol=1e-5)
    assert (float(metrics["good"].count), float(metrics["bad"].count)) == (2, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, hand)


def by_hand_traced(params, batch, z0, beta=0.3):
    sums, _ = answer_log_probs(MODEL, params, batch)
    rewards = beta * (sums[:, 0] - batch["reference"][:, 0] - z0)
    losses = jnp.where(batch["good"], 1.2 * jax.nn.sigmoid(-rewards), 0.8 * jax.nn.sigmoid(rewards))
    return losses.mean()


def test_z0_is_clamped_in_one_of_two_directions(policy, other):
    """The two models swapped have opposite ratios: one of the two reference points is 0."""
    found = []
    for mine, theirs in ((policy, other), (other, policy)):
        batch = answers()
        batch["reference"], _ = answer_log_probs(MODEL, theirs, batch)
        found.append(float(kto(MODEL)(mine, None, batch, None)[1]["z0"].value))
    assert min(found) == 0 and max(found) > 0


def test_a_policy_that_is_its_reference_has_half_the_weights(policy):
    batch = answers()
    batch["reference"], _ = answer_log_probs(MODEL, policy, batch)
    value, _ = kto(MODEL, 0.1, 1.2, 0.9)(policy, None, batch, None)
    assert float(value) == pytest.approx((2 * 1.2 + 0.9) / 3 / 2, rel=1e-6)


def test_rows_of_padding_say_nothing(policy, other):
    batch = answers()
    batch["reference"], _ = answer_log_probs(MODEL, other, batch)
    padded = {name: np.concatenate([x, np.zeros_like(x[:1])]) for name, x in batch.items()}
    padded["reference"][-1] = -100
    for mine, more in zip(
        *(jax.tree.leaves(kto(MODEL)(policy, None, x, None)) for x in (batch, padded)), strict=True
    ):
        np.testing.assert_allclose(mine, more, rtol=1e-5)


def test_a_live_reference_is_the_cached_one(policy, other):
    batch = answers()
    live = GRADS(kto(MODEL, reference=in_context()), policy, {"reference": other}, batch)
    batch["reference"], _ = answer_log_probs(MODEL, other, batch)
    cached = GRADS(kto(MODEL), policy, None, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), live, cached)


def test_devices_share_one_reference_point(policy, other):
    batch = answers((True, False, True, True))
    batch["reference"], _ = answer_log_probs(MODEL, other, batch)
    wanted, _ = GRADS(kto(MODEL), policy, None, batch)
    rows = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    found, _ = GRADS(kto(MODEL), policy, None, jax.device_put(batch, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


def test_what_kto_cannot_do_without(policy):
    with pytest.raises(ValueError, match="a batch of 1 has none, take 2 or more"):
        kto(MODEL)(policy, None, answers((True,)), None)
    with pytest.raises(ValueError, match="KTO needs a reference"):
        kto(MODEL)(policy, None, answers(), None)
