"""Losses over tokens of pairs: hand numbers, limits, extremes, and what is computed in chunks."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.losses.preference import dpo
from research.losses.token_preference import (
    TOKEN_LOSSES,
    TokenPairs,
    ld_dpo,
    tdpo1,
    tdpo2,
    token_pairs,
    wpo,
    wpo_weights,
)

# One row: two prompt positions, a chosen answer of 2 tokens, a gap, a rejected one of 3, padding.
ANSWERS = jnp.array([[0, 0, 1, 1, 0, 2, 2, 2, 0]])


def placed(chosen, rejected, elsewhere=9.0):
    row = [elsewhere, elsewhere, *chosen, elsewhere, *rejected, elsewhere]
    return jnp.array([row], jnp.float32)


HAND = TokenPairs(
    log_probs=placed([-1, -2], [-1, -1, -4]),
    reference=placed([-2, -3], [-2, -1, -2]),
    divergence=placed([0.1, 0.2], [0.3, 0.4, 0.5]),
    collision=placed([-0.5, -1], [-1, -0.5, -1.5]),
    answers=ANSWERS,
)


def logistic(h):
    return math.log1p(math.exp(-h))


def test_whole_answers():
    pairs = HAND.pairs()
    assert [float(x[0]) for x in (pairs.chosen, pairs.rejected)] == [-3, -6]
    assert [float(x[0]) for x in (pairs.chosen_tokens, pairs.rejected_tokens)] == [2, 3]
    assert float(pairs.margin[0]) == 3  # (−3 + 5) − (−6 + 5)


@pytest.mark.parametrize(("alpha", "margin"), [(1.0, 3.0), (0.5, 2.0), (0.0, 1.0)])
def test_ld_dpo_by_hand(alpha, margin):
    """The third token of the rejected answer, of ratio −2, counts α."""
    np.testing.assert_allclose(ld_dpo(HAND, 0.2, alpha), logistic(0.2 * margin), rtol=1e-6)


def test_wpo_by_hand():
    """Means −0.75 and −1 of the aligned log-probabilities."""
    np.testing.assert_allclose(wpo_weights(HAND), math.exp(-1.75), rtol=1e-6)
    np.testing.assert_allclose(wpo(HAND, 0.2), math.exp(-1.75) * logistic(0.6), rtol=1e-6)
    certain = HAND.replace(collision=HAND.log_probs)
    np.testing.assert_allclose(wpo(certain, 0.2), dpo(HAND.pairs(), 0.2), rtol=1e-6)
    weight = jax.grad(lambda x: wpo_weights(HAND.replace(log_probs=x)).sum())(HAND.log_probs)
    assert not weight.any()


def test_tdpo_by_hand():
    """D_w = 0.3, D_l = 1.2."""
    np.testing.assert_allclose(tdpo1(HAND, 0.2), logistic(0.2 * (3 - 0.9)), rtol=1e-6)
    np.testing.assert_allclose(tdpo2(HAND, 0.2, 0.5), logistic(0.2 * (3 - 0.45)), rtol=1e-6)
    np.testing.assert_allclose(tdpo2(HAND, 0.2, 1.0), tdpo1(HAND, 0.2), rtol=1e-6)
    np.testing.assert_allclose(tdpo2(HAND, 0.2, 0.0), dpo(HAND.pairs(), 0.2), rtol=1e-6)
    slope = jax.grad(lambda d: tdpo2(HAND.replace(divergence=d), 0.2).sum())(HAND.divergence)
    assert not slope[0, 2:4].any() and (slope[0, 5:8] > 0).all()
    assert (jax.grad(lambda d: tdpo1(HAND.replace(divergence=d), 0.2).sum())(HAND.divergence) < 0)[
        0, 2:4
    ].all()


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_ln_2_at_the_reference_and_finite_at_extremes(name):
    loss = TOKEN_LOSSES[name]
    same = HAND.replace(reference=HAND.log_probs, divergence=jnp.zeros_like(HAND.divergence))
    scale = wpo_weights(same) if name == "wpo" else 1.0
    np.testing.assert_allclose(loss(same), scale * math.log(2), rtol=1e-6)
    for low, high in ((-1e4, 0.0), (0.0, -1e4), (-1e4, -1e4), (0.0, 0.0)):
        far = HAND.replace(
            log_probs=placed([low] * 2, [high] * 3),
            divergence=placed([-low] * 2, [-high] * 3),
            collision=placed([-1e4] * 2, [0.0] * 3),
        )
        value, slopes = jax.value_and_grad(
            lambda p, d, far=far: loss(far.replace(log_probs=p, divergence=d)).sum(), (0, 1)
        )(far.log_probs, far.divergence)
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in slopes), (low, high)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_what_is_no_answer_does_not_matter(name):
    noise = {
        field: jnp.where(ANSWERS == 0, -7.0, getattr(HAND, field))
        for field in ("log_probs", "reference", "divergence", "collision")
    }
    loss = TOKEN_LOSSES[name]
    np.testing.assert_array_equal(loss(HAND.replace(**noise)), loss(HAND))
    empty = jax.tree.map(jnp.zeros_like, HAND)
    assert np.isfinite(loss(empty)).all()


def test_statistics_in_chunks_are_those_of_whole_logits(key):
    D, V = 3, 11
    keys = jax.random.split(key, 4)
    heads = tuple(jax.random.normal(k, (D, V)) for k in keys[:2])
    hidden = jax.random.normal(keys[2], (1, 9, 2 * D))
    targets = jax.random.randint(keys[3], (1, 9), 0, V)

    def project(heads, h):
        return h[..., :D] @ heads[0], h[..., D:] @ heads[1]

    policy, reference = (jax.nn.log_softmax(x) for x in project(heads, hidden))
    counted = ANSWERS != 0
    own = lambda x: jnp.take_along_axis(x, targets[..., None], -1)[..., 0]  # noqa: E731
    wanted = {
        "log_probs": own(policy),
        "reference": own(reference),
        "divergence": (jnp.exp(reference) * (reference - policy)).sum(-1),
        "collision": jnp.log(jnp.square(jnp.exp(policy)).sum(-1)),
    }
    found = token_pairs(project, heads, hidden, targets, ANSWERS, chunk=2)
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(found, name), jnp.where(counted, value, 0), atol=1e-5)

    of_heads = jax.grad(
        lambda heads: tdpo1(token_pairs(project, heads, hidden, targets, ANSWERS, 2)).sum()
    )(heads)
    assert of_heads[0].any() and not of_heads[1].any()


def test_a_bad_constant():
    with pytest.raises(ValueError, match=r"in \[0, 1\], not 2"):
        partial(ld_dpo, alpha=2)(HAND)
