"""The max-z loss: a hand number, the original's average, and plain and fused gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from research.losses.lm import cross_entropy, fused_cross_entropy


def project(params, hidden):
    return hidden @ params


def test_hand_number():
    logits = jnp.array([[3.0, 1.0, 0.0], [-1.0, -2.0, -4.0], [9.0, 0.0, 0.0]])
    targets, weights = jnp.array([1, 0, 2]), jnp.array([0.5, 0.25, 0.0])
    plain, _ = cross_entropy(logits, targets, weights)
    with_term, metrics = cross_entropy(logits, targets, weights, max_z_loss=0.1)
    np.testing.assert_allclose(with_term - plain, 0.1 * (0.5 * 9 + 0.25 * 1), rtol=1e-5)
    assert metrics["loss"].count == 2  # and what is reported stays the likelihood


def test_the_gradient_is_of_the_largest_logit_alone(key):
    logits = jax.random.normal(key, (4, 7))
    targets, weights = jnp.arange(4), jnp.full(4, 0.25)
    with_term, plain = (
        jax.grad(lambda z, mu=mu: cross_entropy(z, targets, weights, max_z_loss=mu)[0])(logits)
        for mu in (2e-4, 0.0)
    )
    top = logits.max(-1, keepdims=True)
    want = jnp.where(logits == top, 2e-4 * 2 * top / 4, 0)
    np.testing.assert_allclose(with_term - plain, want, atol=1e-7)


def test_fused_equals_plain_in_value_and_gradient(key):
    keys = jax.random.split(key, 3)
    hidden, params = jax.random.normal(keys[0], (2, 9, 5)), jax.random.normal(keys[1], (5, 11))
    params = params.at[:, 4].set(params[:, 7])  # columns that tie
    targets = jax.random.randint(keys[2], (2, 9), 0, 11)
    weights = jnp.linspace(0, 1, 18).reshape(2, 9).at[0, 3].set(0)
    terms = {"max_z_loss": 0.3, "z_loss": 0.1, "label_smoothing": 0.2}

    def plain(params, hidden):
        return cross_entropy(project(params, hidden), targets, weights, **terms)[0]

    def fused(params, hidden):
        return fused_cross_entropy(project, params, hidden, targets, weights, 4, **terms)[0]

    (got, got_grads), (want, want_grads) = (
        jax.value_and_grad(f, argnums=(0, 1))(params, hidden) for f in (fused, plain)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
