"""Next-token cross-entropy, plain and fused with the output projection.

    loss = Σ_t w_t (lse_t − (1−ε) z_t[y_t] − ε mean(z_t) + ζ lse_t² + μ max_v z_t[v]²),
    lse_t = log Σ_v exp z_t[v]

with logits z, label smoothing ε (spread over all V classes, the target included), the z-loss ζ of
PaLM (arXiv:2204.02311, §5) and the max-z loss μ of Baichuan 2 (arXiv:2309.10305, 2e-4 there; its
code averages the term over all positions, those without loss included; here each has its weight). Natural logarithm, float32. The loss is a weighted *sum*: the
weights come already normalised (see `research.types.Objective`).

The fused form never holds [B, T, V]. It goes over chunks of positions and takes the gradient of a
chunk while its logits are there: the cotangent of a sum is one factor, which can wait. Nothing is
computed twice (Cut Cross-Entropy, arXiv:2411.09009, recomputes). Positions without loss are moved
behind the others and their chunks are not computed, so the head runs only where there is loss.

ε = ζ = μ = 0 gives the negative log-likelihood; both forms agree in value and gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.custom_derivatives import SymbolicZero

from research.losses.rows import Rows, compact, per_position
from research.types import Array, Mean, PyTree

# (params, hidden [..., D]) -> logits [..., V]
Project = Callable[[PyTree, Array], Array]
Metrics = dict[str, Mean]


@dataclass(frozen=True)
class Terms:
    """The optional terms of the loss: ζ, ε and μ above."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    max_z_loss: float = 0.0


@struct.dataclass
class Sums:
    """What adds over positions: the loss; and nll, hits and number of those of non-zero weight."""

    loss: Array
    nll: Array
    correct: Array
    tokens: Array

    @classmethod
    def zero(cls) -> Sums:
        return cls(*[jnp.zeros((), jnp.float32)] * 4)

    def __add__(self, other: Sums) -> Sums:
        return jax.tree.map(jnp.add, self, other)

    def metrics(self) -> Metrics:
        """`loss`: nats a supervised token, every one counting 1; `accuracy`; `tokens` (see .total)."""
        means = {
            "loss": Mean(self.nll, self.tokens),
            "accuracy": Mean(self.correct, self.tokens),
            "tokens": Mean(self.tokens, jnp.ones_like(self.tokens)),
        }
        return jax.tree.map(lax.stop_gradient, means)


def cross_entropy(
    logits: Array,
    targets: Array,
    weights: Array,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    max_z_loss: float = 0.0,
) -> tuple[Array, Metrics]:
    """The loss above from logits [..., V], targets and weights [...]. -> (sum, metrics).

    A hit is a target whose logit is the largest; ties count.
    """
    sums, _ = _sums(logits, targets, weights, Terms(z_loss, label_smoothing, max_z_loss))
    return sums.loss, sums.metrics()


def fused_cross_entropy(
    project: Project,
    params: PyTree,
    hidden: Array,
    targets: Array,
    weights: Array,
    chunk: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    max_z_loss: float = 0.0,
) -> tuple[Array, Metrics]:
    """`cross_entropy(project(params, hidden), ...)` without the logits. -> (sum, metrics).

    hidden [B, T, D]; targets, weights [B, T]. `project` is hashable, is applied to [B, chunk, D]
    and must treat positions independently; `params` holds what it needs and nothing more.
    Gradients are computed for hidden and for exactly those leaves of `params` that are being
    differentiated; differentiating `weights` is a ValueError. `chunk` counts positions of one row.
    """
    terms = Terms(z_loss, label_smoothing, max_z_loss)
    sums = _fused(project, chunk, terms, params, hidden, targets, weights)
    return sums.loss, sums.metrics()


def token_log_probs(
    project: Project,
    params: PyTree,
    hidden: Array,
    targets: Array,
    weights: Array | None = None,
    chunk: int | None = None,
) -> Array:
    """log p(target) at each position, [B, T] float32, in chunks; 0 where `weights` is 0.

    Differentiable in reverse mode, and no pass holds [B, T, V]: the gradient of the states is taken while a
    chunk's logits are there, as a position's cotangent is one factor; for that of `params` they are computed again.
    Chunks without any weight are skipped.
    """
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    return _log_probs(project, chunk, params, hidden, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _log_probs(project, chunk, params, hidden, targets, weights) -> Array:
    return _log_probs_again(project, chunk, params, hidden, targets, weights)


def _log_probs_again(project, chunk, params, hidden, targets, weights) -> Array:
    """The same; its backward pass computes logits again."""

    def of(params: PyTree, h: Array, y: Array) -> Array:
        return _log_prob(project(params, h), y)

    return per_position(of, params, hidden, targets, weights, chunk)


def _log_probs_forward(project, chunk, params, hidden, targets, weights):
    def both(params: PyTree, h: Array, y: Array) -> Array:
        """[B, c, 1 + D]: log p, and its gradient in the states."""
        logits, pull = jax.vjp(partial(project, params), h)
        target = y[..., None] == jnp.arange(logits.shape[-1])
        of_logits = target - jax.nn.softmax(logits.astype(jnp.float32))
        own = _log_prob(logits, y)[..., None], *pull(of_logits.astype(logits.dtype))
        return jnp.concatenate([x.astype(jnp.float32) for x in own], axis=-1)

    found = per_position(both, params, hidden, targets, weights, chunk)
    return found[..., 0], (params, hidden, targets, weights, found[..., 1:])


def _log_probs_backward(project, chunk, saved, cotangent):
    params, hidden, targets, weights, gradient = saved
    again = lambda params: _log_probs_again(project, chunk, params, hidden, targets, weights)  # noqa: E731
    (d_params,) = jax.vjp(again, params)[1](cotangent)
    return d_params, (cotangent[..., None] * gradient).astype(hidden.dtype), None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def token_log_probs_and_entropy(
    project: Project,
    params: PyTree,
    hidden: Array,
    targets: Array,
    weights: Array | None = None,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """`token_log_probs`, and the entropy of the distribution at each position, nats, 0 where it is 0."""

    def both(params: PyTree, h: Array, y: Array) -> Array:
        logits = project(params, h).astype(jnp.float32)
        log_p = jax.nn.log_softmax(logits)
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return jnp.stack([_log_prob(logits, y), entropy], axis=-1)

    found = per_position(both, params, hidden, targets, weights, chunk)
    return found[..., 0], found[..., 1]


def _log_prob(logits: Array, targets: Array) -> Array:
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def _sums(logits: Array, targets: Array, weights: Array, terms: Terms) -> tuple[Sums, Array]:
    """The sums over logits [..., V], and lse [...]."""
    logits, weights = logits.astype(jnp.float32), weights.astype(jnp.float32)
    top = lax.stop_gradient(logits.max(-1))
    lse = jnp.log(jnp.exp(logits - top[..., None]).sum(-1)) + top
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    counted = weights != 0
    nll = jnp.where(counted, lse - picked, 0)
    loss = nll
    if terms.label_smoothing:
        loss = loss + terms.label_smoothing * jnp.where(counted, picked - logits.mean(-1), 0)
    if terms.z_loss:
        loss = loss + terms.z_loss * jnp.where(counted, lse, 0) ** 2
    if terms.max_z_loss:
        loss = loss + terms.max_z_loss * jnp.where(counted, logits.max(-1), 0) ** 2
    hits = counted & (picked >= top)
    return Sums(
        (loss * weights).sum(),
        nll.sum(),
        hits.sum(dtype=jnp.float32),
        counted.sum(dtype=jnp.float32),
    ), lse


def _logits_gradient(logits: Array, lse: Array, targets: Array, weights: Array, terms: Terms):
    """∂ loss / ∂ logits, in the dtype of logits; one pass, with exp taken again and not stored."""
    z, w = logits.astype(jnp.float32), weights.astype(jnp.float32)
    eps = terms.label_smoothing
    vocabulary = lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    target = jnp.where(vocabulary == targets[..., None], 1 - eps, 0) + eps / z.shape[-1]
    softmax = jnp.exp(z - lse[..., None]) * (1 + 2 * terms.z_loss * lse)[..., None]
    if terms.max_z_loss:
        top = z.max(-1, keepdims=True)
        largest = z == top  # equals share, as in the gradient of a maximum
        softmax += 2 * terms.max_z_loss * top * largest / largest.sum(-1, keepdims=True)
    return jnp.where((w != 0)[..., None], w[..., None] * (softmax - target), 0).astype(logits.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(project, chunk, terms, params, hidden, targets, weights) -> Sums:
    return _value_loop(project, terms, params, compact(hidden, targets, weights, chunk))


def _value_loop(project: Project, terms: Terms, params: PyTree, rows: Rows) -> Sums:
    def body(i, total):
        h, y, w = rows.slice(i)
        return total + _sums(project(params, h), y, w, terms)[0]

    return rows.loop(body, Sums.zero())


def _gradient_loop(
    project: Project, terms: Terms, trained: list[Array], rows: Rows, of_hidden: bool
):
    """-> (sums, gradients of `trained` in float32, gradient of rows.hidden or None).

    `project` takes (trained, h) here. What is not asked for is not computed.
    """

    def body(i, carry):
        total, d_trained, d_hidden = carry
        h, y, w = rows.slice(i)
        args = (trained, h) if of_hidden else (trained,)
        logits, pull = jax.vjp(lambda trained, h=h: project(trained, h), *args)
        # Flat, so that XLA may write the gradient over the logits.
        z, y, w = logits.reshape(-1, logits.shape[-1]), y.reshape(-1), w.reshape(-1)
        sums, lse = _sums(z, y, w, terms)
        d_part, *d_h = pull(_logits_gradient(z, lse, y, w, terms).reshape(logits.shape))
        d_trained = [
            total + part.astype(jnp.float32) for total, part in zip(d_trained, d_part, strict=True)
        ]
        d_hidden = rows.place(d_hidden, d_h[0], i) if of_hidden else None
        return total + sums, d_trained, d_hidden

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in trained]
    d_hidden = jnp.zeros_like(rows.hidden) if of_hidden else None
    return rows.loop(body, (Sums.zero(), zeros, d_hidden))


def _forward(project, chunk, terms, params, hidden, targets, weights):
    """The value and, as residuals, the gradients; None for every leaf that asks for none."""
    if weights.perturbed:
        raise ValueError("fused_cross_entropy has no gradient with respect to `weights`")
    leaves, treedef = jax.tree.flatten(params)
    values = [leaf.value for leaf in leaves]
    which = [i for i, leaf in enumerate(leaves) if leaf.perturbed]
    rows = compact(hidden.value, targets.value, weights.value, chunk)

    def project_trained(trained, h):
        new = dict(zip(which, trained, strict=True))
        return project(treedef.unflatten([new.get(i, x) for i, x in enumerate(values)]), h)

    trained = [values[i] for i in which]
    sums, d_trained, d_hidden = _gradient_loop(
        project_trained, terms, trained, rows, bool(hidden.perturbed)
    )
    gradients: list = [None] * len(leaves)
    for i, gradient in zip(which, d_trained, strict=True):
        gradients[i] = gradient.astype(values[i].dtype)
    d_hidden = rows.restore(d_hidden) if hidden.perturbed else None
    return sums, (treedef.unflatten(gradients), d_hidden)


def _backward(project, chunk, terms, gradients, cotangents):
    """The stored gradients times the cotangent of the loss; the metrics have none."""
    if isinstance(cotangents.loss, SymbolicZero):
        return None, None, None, None
    scale = lambda g: (cotangents.loss * g.astype(jnp.float32)).astype(g.dtype)  # noqa: E731
    d_params, d_hidden = jax.tree.map(scale, gradients)
    return d_params, d_hidden, None, None


_fused.defvjp(_forward, _backward, symbolic_zeros=True)
