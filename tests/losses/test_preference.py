"""Preference losses against trl's values and gradients, hand numbers and limits."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.losses import kto as singles
from research.losses import preference
from research.losses.kto import Answers
from research.losses.preference import Pairs

# Made by scripts/references/preference_losses.py.
TRL = load_file(Path(__file__).parent / "fixtures" / "preference_losses.safetensors")
BETA = 0.3
NAMES = ("chosen", "rejected", "reference_chosen", "reference_rejected")


def threshold(pairs, beta):
    """The mean that trl's running moments have after one batch; they are before the losses here."""
    return preference.bco_threshold(pairs, beta, jnp.zeros(()), jnp.zeros(()))[0]


# trl's name: ours, a function of pairs
AGAINST_TRL = {
    "dpo": partial(preference.dpo, beta=BETA),
    "cdpo": partial(preference.dpo, beta=BETA, smoothing=0.1),
    "robust": partial(preference.robust_dpo, beta=BETA, smoothing=0.1),
    "ipo": partial(preference.ipo, beta=BETA),
    "ipo_average": partial(preference.ipo, beta=BETA, average=True),
    "hinge": partial(preference.hinge, beta=BETA),
    "exo": partial(preference.exo, beta=BETA, smoothing=0.01),
    "nca": partial(preference.nca, beta=BETA),
    "sppo": partial(preference.sppo, beta=BETA),
    "aot_paired": partial(preference.aot_paired, beta=BETA, smoothing=0.1),
    "aot_unpaired": partial(preference.aot_unpaired, beta=BETA, smoothing=0.1),
    "apo_zero": partial(preference.apo_zero, beta=BETA),
    "apo_down": partial(preference.apo_down, beta=BETA),
    "discopop": partial(preference.discopop, beta=BETA),
    "bco": lambda pairs: preference.bco(pairs, BETA, threshold(pairs, BETA)),
    "f_js": partial(preference.f_dpo, beta=BETA, divergence="js"),
    "f_alpha": partial(preference.f_dpo, beta=BETA, divergence="alpha"),
    "simpo": partial(preference.simpo, beta=BETA, gamma=0.5),
    "cpo": partial(preference.cpo, beta=BETA),
    "orpo": partial(preference.orpo, beta=BETA),
}


# apo_down lowers chosen answers too; DiscoPOP has a hump near h = 0, as its paper shows.
NOT_MONOTONE = ("apo_down", "discopop")


def pairs_of(given):
    tokens = {f"{name}_tokens": given[f"{name}_tokens"] for name in NAMES[:2]}
    return Pairs(**{name: jnp.asarray(given[name], jnp.float32) for name in NAMES}, **tokens)


def simple(chosen=(-3.0, -9.0), rejected=(-4.0, -2.0), tokens=(3.0, 4.0), reference=None):
    chosen, rejected, tokens = (jnp.array(x) for x in (chosen, rejected, tokens))
    reference = (chosen, rejected) if reference is None else tuple(map(jnp.array, reference))
    return Pairs(chosen, rejected, *reference, tokens, tokens)


@pytest.mark.parametrize("name", AGAINST_TRL)
def test_equals_trl(name):
    pairs, loss = pairs_of(TRL), AGAINST_TRL[name]
    losses = loss(pairs)
    grads = jax.grad(
        lambda chosen, rejected: loss(pairs.replace(chosen=chosen, rejected=rejected)).sum(), (0, 1)
    )(pairs.chosen, pairs.rejected)
    theirs = (TRL[f"{name}.{part}"] for part in ("loss", "chosen", "rejected"))
    for mine, wanted in zip((losses, *grads), theirs, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5 * max(1, abs(wanted).max()))


@pytest.mark.parametrize("name", ["kto", "unpaired_apo"])
def test_single_answers_equal_trl(name):
    both = {x: [TRL[f"{x}{n}"] for n in NAMES[:2]] for x in ("", "reference_")}
    policy, reference = (jnp.concatenate(both[x]).astype(jnp.float32) for x in both)
    moved = [np.concatenate([TRL[f"{x}{n}_moved"] for n in NAMES[:2]]) for x in both]
    good = jnp.arange(len(policy)) < len(policy) // 2

    def losses(policy):
        answers = Answers(policy, reference, good)
        if name == "kto":
            z0 = singles.reference_point(*moved)
            return singles.kto(answers, z0, BETA, 1.2, 0.9)
        weights = jnp.where(good, 1.2, 0.9)  # trl weighs them here too
        return weights * singles.unpaired_apo(answers, BETA)

    np.testing.assert_allclose(losses(policy), TRL[f"{name}.loss"], atol=1e-5)
    grads = jax.grad(lambda x: losses(x).sum())(policy)
    wanted = np.concatenate([TRL[f"{name}.chosen"], TRL[f"{name}.rejected"]])
    np.testing.assert_allclose(grads, wanted, atol=1e-5)


def test_where_the_policy_is_the_reference():
    """ln 2, 1/(4β²), 1, and λ/2 for KTO."""
    pairs, beta = simple(), 0.2
    wanted = {"dpo": math.log(2), "ipo": 1 / (4 * beta**2), "hinge": 1.0, "apo_zero": 1.0}
    for name, value in wanted.items():
        np.testing.assert_allclose(preference.LOSSES[name](pairs, beta), value, rtol=1e-6)
    answers = Answers(pairs.chosen, pairs.chosen, jnp.array([True, False]))
    z0 = singles.reference_point(pairs.chosen, pairs.chosen)
    np.testing.assert_allclose(singles.kto(answers, z0, beta, 1.2, 0.8), [0.6, 0.4], rtol=1e-6)


def test_numbers_of_an_older_release():
    """trl 1.16 on one pair of a tiny Llama: h = −0.4585 gives DPO 0.7163, hinge 1.0457 at β 0.1."""
    h = -0.4585
    pairs = simple((h, h), (0.0, 0.0), reference=((0.0, 0.0), (0.0, 0.0)))
    np.testing.assert_allclose(preference.hinge(pairs, 0.1), 1.04585, atol=1e-5)
    np.testing.assert_allclose(preference.dpo(pairs, 0.1), 0.7163315, atol=1e-5)
    np.testing.assert_allclose(preference.robust_dpo(pairs, 0.1, 0.1), 0.72206, atol=1e-5)
    np.testing.assert_allclose(preference.ipo(pairs, 0.1), 29.7945, atol=0.01)


def test_dpo_by_length():
    """Ratios +3 of 3 tokens and −2 of 4: β(1 + 0.5); a token an answer is DPO."""
    pairs = simple((0.0, 0.0), (-7.0, -7.0), reference=((-3.0, -3.0), (-5.0, -5.0)))
    pairs = pairs.replace(chosen_tokens=jnp.full(2, 3.0), rejected_tokens=jnp.full(2, 4.0))
    wanted = math.log1p(math.exp(-0.2 * 1.5))
    np.testing.assert_allclose(preference.sigmoid_norm(pairs, 0.2), wanted, rtol=1e-6)
    single = pairs.replace(chosen_tokens=jnp.ones(2), rejected_tokens=jnp.ones(2))
    np.testing.assert_allclose(
        preference.sigmoid_norm(single, 0.2), preference.dpo(single, 0.2), rtol=1e-6
    )


@pytest.mark.parametrize("name", preference.LOSSES)
def test_extreme_log_probabilities_are_finite(name):
    loss = preference.LOSSES[name]
    for chosen, rejected in ((-1e4, -1.0), (-1.0, -1e4), (-1e-9, -1e4), (0.0, 0.0), (-1e4, 0.0)):
        pairs = simple((chosen,) * 2, (rejected,) * 2, reference=((-50.0,) * 2, (-60.0,) * 2))
        value, grads = jax.value_and_grad(lambda pairs: loss(pairs).sum())(pairs)
        assert np.isfinite(value), (chosen, rejected)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads)), (chosen, rejected)


@pytest.mark.parametrize("good", [True, False])
def test_kto_is_finite_at_extremes(good):
    """It is bounded by λ, wherever the answer stands to z₀."""
    for policy, reference in ((-1e4, 0.0), (0.0, -1e4), (-1e4, -1e4)):
        for z0 in (0.0, 1e4):

            def loss(x, reference=reference, z0=z0):
                answers = Answers(x, jnp.full(2, reference), jnp.full(2, good))
                return singles.kto(answers, z0, 0.1, 1.3, 1.3).sum()

            value, slope = jax.value_and_grad(loss)(jnp.full(2, policy))
            assert 0 <= value <= 2.6 + 1e-5 and np.isfinite(slope).all()


@pytest.mark.parametrize("name", preference.LOSSES)
def test_a_better_margin_is_a_lower_loss_and_longer_answers_matter_where_they_should(name):
    loss = preference.LOSSES[name]
    reference = (-5.0, -5.0), (-5.0, -5.0)
    worse = simple((-6.0, -6.0), (-4.0, -4.0), reference=reference)
    better = simple((-4.0, -4.0), (-6.0, -6.0), reference=reference)
    assert loss(better).sum() < loss(worse).sum() or name in NOT_MONOTONE
    longer = better.replace(
        chosen=2 * better.chosen,
        rejected=2 * better.rejected,
        reference_chosen=2 * better.reference_chosen,
        reference_rejected=2 * better.reference_rejected,
        chosen_tokens=2 * better.chosen_tokens,
        rejected_tokens=2 * better.rejected_tokens,
    )
    same = np.allclose(loss(longer), loss(better), rtol=1e-6)
    assert same == (name in ("simpo", "orpo", "sigmoid_norm"))
    if name == "ipo":
        a, b = (preference.ipo(x, average=True) for x in (longer, better))
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_robust_dpo_is_dpo_on_average():
    """Labels flipped with probability ε: the mean of robust losses is the clean loss."""
    pairs, e = simple(reference=((-4.0, -4.0), (-4.0, -3.0))), 0.2
    flipped = Pairs(
        pairs.rejected,
        pairs.chosen,
        pairs.reference_rejected,
        pairs.reference_chosen,
        pairs.rejected_tokens,
        pairs.chosen_tokens,
    )
    noisy = [preference.robust_dpo(x, 0.5, e) for x in (pairs, flipped)]
    np.testing.assert_allclose(
        (1 - e) * noisy[0] + e * noisy[1], preference.dpo(pairs, 0.5), rtol=1e-5
    )


def test_forward_kl_by_hand():
    """f'(u) = −1/u: u_w = 2, u_l = 1/2 gives −1/2 + 2."""
    log2 = math.log(2)
    pairs = simple((log2, log2), (-log2, -log2), reference=((0.0, 0.0), (0.0, 0.0)))
    wanted = math.log1p(math.exp(-0.4 * 1.5))
    np.testing.assert_allclose(preference.f_dpo(pairs, 0.4, "forward_kl"), wanted, rtol=1e-6)
    near = preference.f_dpo(pairs, 0.4, "alpha", alpha=1e-5)
    np.testing.assert_allclose(near, preference.dpo(pairs, 0.4), rtol=1e-4)


def test_kto_weights():
    assert singles.reference_point(jnp.array([-3.0]), jnp.array([-1.0])) == 0
    good, bad = singles.balanced_weights(100, 400)
    assert (good, bad) == (4.0, 1.0)
    good, bad = singles.balanced_weights(300, 100, 4 / 3)
    assert bad == pytest.approx(300 / 100 * 3 / 4) and good == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: preference.robust_dpo(p, smoothing=0.5), "at least 0 and below 0.5, not 0.5"),
        (lambda p: preference.exo(p, smoothing=0.0), "a smoothing between 0 and 1, not 0.0"),
        (
            lambda p: preference.f_dpo(p, divergence="kl"),
            "one of reverse_kl, forward_kl, js, alpha",
        ),
        (lambda p: preference.f_dpo(p, divergence="alpha", alpha=1.0), "alpha must be between"),
        (lambda p: singles.balanced_weights(0, 3), "needs good and bad answers; there are 0 and 3"),
        (lambda p: singles.balanced_weights(1, 3, 2.0), r"is in \[1, 4/3\], not 2.0"),
    ],
)
def test_bad_constants(call, message):
    with pytest.raises(ValueError, match=message):
        call(simple())
