"""Objectives of answers that were judged: of pairs (preference losses, reward models) and single (KTO)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.losses import kto as singles
from research.losses.lm import token_log_probs
from research.losses.preference import PairLoss, Pairs
from research.losses.reward import pairwise
from research.losses.token_preference import TokenLoss, TokenPairs, token_pairs
from research.models.heads import Head
from research.objectives.model import head_params, project_with, states
from research.objectives.reference import Reference
from research.types import Array, Batch, Mean, Objective, Params


def preference(
    model: Any,
    loss: PairLoss,
    chunk: int | None = None,
    reference: Reference | None = None,
    reference_free: bool = False,
) -> Objective:
    """Σ weights · loss of pairs of answers (`losses.preference`).

    The batch holds tokens, targets, weights, segment_ids and positions [P, T] as `data.preferences`
    lays pairs out, and pair_weights [P]. The reference's log-probabilities of both answers are the batch's
    `reference` [P, 2] (`answer_log_probs`), or those of a live `reference` (`objectives.reference`); a loss
    that looks at none (SimPO, ORPO, CPO, SLiC) may have neither when `reference_free` says so. Metrics over
    pairs of non-zero weight: loss, accuracy (margin above 0), margin of log-ratios, and the two log-probabilities,
    chosen and rejected.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        sums, tokens = answer_log_probs(model, params, batch, rng, chunk)
        theirs = reference_log_probs(model, params, context, batch, chunk, reference)
        if theirs is None and not reference_free:
            raise ValueError(
                "there is no reference: put its log-probabilities into the batch as `reference`, name a live "
                "one, or say reference_free for a loss that looks at none"
            )
        theirs = jnp.zeros_like(sums) if theirs is None else theirs
        pairs = Pairs(*sums.T, *theirs.T, *tokens.T)
        return _weighed(loss(pairs), pairs, batch["pair_weights"])

    return objective


def token_preference(
    model: Any, loss: TokenLoss, reference: Reference, chunk: int | None = None
) -> Objective:
    """Σ weights · loss of pairs whose tokens are looked at singly (`losses.token_preference`).

    Batch and metrics are those of `preference`; the reference is live, as its whole distributions are
    compared with the policy's.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        tokens = answer_tokens(model, params, context, batch, rng, chunk, reference)
        return _weighed(loss(tokens), tokens.pairs(), batch["pair_weights"])

    return objective


def answer_tokens(
    model: Any,
    params: Params,
    context: Any,
    batch: Batch,
    rng: Array | None,
    chunk: int | None,
    reference: Reference,
) -> TokenPairs:
    """What policy and reference say at each position of rows of pairs; a gradient of the policy's alone."""
    other, theirs = reference(model, params, context)
    theirs = jax.lax.stop_gradient(theirs)
    hidden = states(model, params, batch, rng)
    D = hidden.shape[-1]

    def project(heads: Params, both: Array) -> tuple[Array, Array]:
        mine, its = both[..., :D], both[..., D:]
        return project_with(model, heads[0], mine), project_with(other, heads[1], its)

    heads = head_params(params), head_params(theirs)
    both = jnp.concatenate([hidden, states(other, theirs, batch)], axis=-1)
    answers = jnp.where(batch["weights"] != 0, batch["segment_ids"], 0)
    return token_pairs(project, heads, both, batch["targets"], answers, chunk)


def _weighed(losses: Array, pairs: Pairs, weights: Array) -> tuple[Array, dict[str, Mean]]:
    counted = (weights != 0).astype(jnp.float32)
    found = {
        "loss": losses,
        "accuracy": (pairs.margin > 0).astype(jnp.float32),
        "margin": pairs.margin,
        "chosen": pairs.chosen,
        "rejected": pairs.rejected,
    }
    metrics = {name: Mean.of(value, counted) for name, value in found.items()}
    return (losses * weights).sum(), jax.lax.stop_gradient(metrics)


def kto(
    model: Any,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
    chunk: int | None = None,
    reference: Reference | None = None,
) -> Objective:
    """Σ weights · KTO of single answers (`losses.kto`), λ_D = good_weight and λ_U = bad_weight.

    The batch holds rows as `data.judged` lays them out, good [P] and answer_weights [P]; the reference is
    that of `preference`, and needed. z₀ is a mean over the rows that one call sees: all devices' of a mesh,
    but each micro-batch has its own. ValueError for one row. Metrics over answers of non-zero weight: loss,
    z0 (nats), and the log-ratio of good and of bad answers.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        singles.check_size(len(batch["good"]))
        sums, _ = answer_log_probs(model, params, batch, rng, chunk)
        theirs = reference_log_probs(model, params, context, batch, chunk, reference)
        if theirs is None:
            raise ValueError("KTO needs a reference: the batch has none, and none was given")
        weights, good = batch["answer_weights"], batch["good"]
        counted = (weights != 0).astype(jnp.float32)
        z0 = singles.reference_point(sums[:, 1], theirs[:, 1], counted)
        answers = singles.Answers(sums[:, 0], theirs[:, 0], good)
        losses = singles.kto(answers, z0, beta, good_weight, bad_weight)
        metrics = {
            "loss": Mean.of(losses, counted),
            "z0": Mean.of(z0),
            "good": Mean.of(answers.ratios, counted * good),
            "bad": Mean.of(answers.ratios, counted * ~good),
        }
        return (losses * weights).sum(), jax.lax.stop_gradient(metrics)

    return objective


def reference_log_probs(
    model: Any,
    params: Params,
    context: Any,
    batch: Batch,
    chunk: int | None,
    reference: Reference | None,
) -> Array | None:
    """The reference's log-probabilities [P, 2] without a gradient: live, or the batch's, or None."""
    if reference is None:
        return batch.get("reference")
    other, theirs = reference(model, params, context)
    return answer_log_probs(other, jax.lax.stop_gradient(theirs), batch, None, chunk)[0]


def reward(model: Any, head: Head, loss: Callable[[Array, Array], Array] = pairwise) -> Objective:
    """Σ weights · loss(scores of the chosen, of the rejected answers) of rows of pairs.

    The batch is that of `preference`, without a reference; the head reads the last token of each
    segment. Metrics over pairs of non-zero weight: loss, accuracy (a tie counts half), margin, score.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        chosen, rejected = answer_scores(model, head, params, batch, rng).T
        losses, counted = loss(chosen, rejected), (batch["pair_weights"] != 0).astype(jnp.float32)
        found = {
            "loss": losses,
            "accuracy": (jnp.sign(chosen - rejected) + 1) / 2,
            "margin": chosen - rejected,
            "score": (chosen + rejected) / 2,
        }
        metrics = {name: Mean.of(value, counted) for name, value in found.items()}
        return (losses * batch["pair_weights"]).sum(), jax.lax.stop_gradient(metrics)

    return objective


def answer_scores(
    model: Any, head: Head, params: Params, batch: Batch, rng: Array | None = None
) -> Array:
    """What a head of one output says of both answers of each row of pairs, [P, 2]."""
    hidden = states(model, params, batch, rng)
    both = [head(params, hidden, batch["segment_ids"] == answer) for answer in (1, 2)]
    return jnp.concatenate(both, axis=-1)


def answer_log_probs(
    model: Any, params: Params, batch: Batch, rng: Array | None = None, chunk: int | None = None
) -> tuple[Array, Array]:
    """(log-probabilities [P, 2] in nats, numbers of tokens [P, 2]) of the answers in rows of pairs; at
    least 1 token is counted, so that a row of padding divides by something."""
    hidden = states(model, params, batch, rng)
    project, head = partial(project_with, model), head_params(params)
    own = token_log_probs(project, head, hidden, batch["targets"], batch["weights"], chunk)
    inside = batch["segment_ids"][..., None] == jnp.array([1, 2])
    sums = jnp.where(inside, own[..., None], 0).sum(1)
    counts = (inside & (batch["weights"][..., None] != 0)).sum(1)
    return sums, jnp.maximum(counts, 1)
