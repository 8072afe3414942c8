"""A natural-gradient step within a trust region (Schulman et al. 2015, arXiv:1502.05477).

    d = F⁻¹ g by conjugate gradients, F the Fisher matrix of the policy on the batch
    step = −√(2δ / dᵀFd) · d, halved until the KL is at most δ and the loss is lower

As an optax transformation: the training loop's gradient comes in, the step goes out. It moves whatever is
trained as part of the policy, so a critic is trained apart or left out (`baseline`, `rloo`, `grpo`). F times a
vector is a second derivative, which the Pallas and C++ kernels of attention lack: the policy is read with
plain attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.kernels.attend import reference
from research.losses.advantages import masked_mean
from research.objectives.model import head_params, project_with, states
from research.train.partition import combine
from research.types import Array, Batch, Params, PyTree


def trpo(
    model: Any,
    max_kl: float = 0.01,
    damping: float = 0.1,
    iterations: int = 10,
    halvings: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """For batches of `research.rl.source`, one epoch of one minibatch an iteration: the region is
    around the policy that sampled. `max_kl` in nats a token. The state counts the steps that no halving made
    acceptable, which move nothing."""

    model = model.clone(config=dataclasses.replace(model.config, attend=reference))

    def init(params: Params) -> dict[str, Array]:
        return {"refused": jnp.zeros([], jnp.int32)}

    def update(grads, state, params=None, *, frozen, batch, **extra):
        log_p = lambda p: _log_p(model, combine(p, frozen), batch)  # noqa: E731
        old, mask = jax.lax.stop_gradient(log_p(params)), batch["mask"]

        def kl(p: Params) -> Array:
            return masked_mean((jnp.exp(old) * (old - log_p(p))).sum(-1), mask)

        def loss(p: Params) -> Array:
            ours = jnp.take_along_axis(log_p(p), batch["targets"][..., None], -1)[..., 0]
            ratio = jnp.exp(jnp.minimum(ours - batch["log_probs"], 20.0))
            return masked_mean(-batch["advantages"] * ratio, mask)

        def fisher(v: PyTree) -> PyTree:
            product = jax.jvp(jax.grad(kl), (params,), (v,))[1]
            return jax.tree.map(lambda a, b: a + damping * b, product, v)

        direction = conjugate_gradients(fisher, grads, iterations)
        size = jnp.sqrt(2 * max_kl / jnp.maximum(_dot(direction, fisher(direction)), 1e-12))
        step = jax.tree.map(lambda d: -size * d, direction)
        share = _line_search(params, step, loss, kl, max_kl, halvings)
        moved = jax.tree.map(lambda s: share * s, step)
        return moved, {"refused": state["refused"] + (share == 0)}

    return optax.GradientTransformationExtraArgs(init, update)


def conjugate_gradients(matrix: Callable[[PyTree], PyTree], b: PyTree, iterations: int) -> PyTree:
    """x with matrix(x) ≈ b, from 0; the matrix is symmetric and positive definite."""

    def body(_, carry):
        x, rest, way, square = carry
        along = matrix(way)
        size = square / jnp.maximum(_dot(way, along), 1e-20)
        x = _plus(x, size, way)
        rest = _plus(rest, -size, along)
        now = _dot(rest, rest)
        return x, rest, _plus(rest, now / jnp.maximum(square, 1e-20), way), now

    zero = jax.tree.map(jnp.zeros_like, b)
    return jax.lax.fori_loop(0, iterations, body, (zero, b, b, _dot(b, b)))[0]


def _line_search(params, step, loss, kl, max_kl: float, halvings: int) -> Array:
    """The greatest of 1, ½, ¼, ... that lowers the loss within the region, or 0."""
    before = loss(params)

    def accepted(share: Array) -> Array:
        moved = _plus(params, share, step)
        return (kl(moved) <= max_kl) & (loss(moved) < before)

    def body(carry):
        share, count, _ = carry
        return share / 2, count + 1, accepted(share / 2)

    wanted = lambda carry: ~carry[2] & (carry[1] < halvings)  # noqa: E731
    one = jnp.ones([])
    share, _, fine = jax.lax.while_loop(wanted, body, (one, 0, accepted(one)))
    return jnp.where(fine, share, 0.0)


def _log_p(model: Any, params: Params, batch: Batch) -> Array:
    """log π [B, T, V] in full: for small vocabularies."""
    hidden = states(model, params, batch)
    logits = project_with(model, head_params(params), hidden) / batch["temperature"]
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def _dot(a: PyTree, b: PyTree) -> Array:
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b)), jnp.zeros([]))


def _plus(a: PyTree, size: Array, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x + size * y, a, b)
