"""Losses bound to models: what the training step differentiates.

An Objective is `(params, context, batch, rng) -> (loss, {name: Mean})`, see `research.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.losses.lm import cross_entropy, fused_cross_entropy, token_log_probs
from research.losses.preference import PairLoss, Pairs
from research.losses.reward import pairwise
from research.models.heads import Head
from research.types import Array, Batch, Mean, Objective, Params

# (params, context, rng) -> (value, {name: Mean}): EWC, L2 to the start, ...
Penalty = Callable[[Params, Any, Array], tuple[Array, dict[str, Mean]]]


def next_token(
    model: Any,
    fused: bool = True,
    chunk: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    max_z_loss: float = 0.0,
) -> Objective:
    """Cross-entropy of `targets` given the tokens before them, Σ weights · −log p (nats).

    The batch holds tokens, targets, weights [B, T] and optionally segment_ids and positions; a
    target is the token *after* its position already. For an encoder–decoder it also holds source
    [B, S] and optionally source_segment_ids and source_positions. With `fused` the logits
    [B, T, V] never exist. `rng` drives dropout; None turns it off. Metrics: loss, accuracy, tokens,
    over the positions of non-zero weight.
    """
    terms = {"z_loss": z_loss, "label_smoothing": label_smoothing, "max_z_loss": max_z_loss}
    project = partial(project_with, model)

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        hidden = states(model, params, batch, rng)
        head = head_params(params)
        targets, weights = batch["targets"], batch["weights"]
        if fused:
            return fused_cross_entropy(project, head, hidden, targets, weights, chunk, **terms)
        return cross_entropy(project(head, hidden), targets, weights, **terms)

    return objective


def classify(model: Any, head: Head) -> Objective:
    """Cross-entropy of one label an example, Σ weights · −log softmax(scores)[label] (nats).

    The batch holds tokens [B, T], labels [B] int32, weights [B] float32 and optionally segment_ids
    and positions; a row is one example. Metrics: loss, accuracy, examples, over the rows of
    non-zero weight.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        scores = head_outputs(model, head, params, batch, rng)
        return _of_examples(scores, batch["labels"], batch["weights"])

    return objective


def regress(model: Any, head: Head) -> Objective:
    """Squared error, Σ weights · mean over outputs of (output − label)².

    The batch is that of `classify`, its labels [B, C] float32. Metrics: loss, absolute_error,
    examples, over the rows of non-zero weight.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        outputs, labels = head_outputs(model, head, params, batch, rng), batch["labels"]
        if outputs.shape != labels.shape:
            raise ValueError(f"labels are {labels.shape}, expected {outputs.shape}, as the outputs")
        errors, counted = outputs - labels, (batch["weights"] != 0).astype(jnp.float32)
        squares = jnp.square(errors).mean(axis=-1)
        metrics = {
            "loss": Mean.of(squares, counted),
            "absolute_error": Mean.of(jnp.abs(errors).mean(axis=-1), counted),
            "examples": Mean(counted.sum(), jnp.ones_like(counted.sum())),
        }
        return (squares * batch["weights"]).sum(), metrics

    return objective


def choose(model: Any, chunk: int | None = None) -> Objective:
    """Cross-entropy of the right one of C continuations, softmax over their log-probabilities.

    The batch holds tokens, targets, segment_ids and counted [B, C, T] (`counted` is 1 where a target
    belongs to the continuation), labels [B] and weights [B]. Label words after a template are such
    continuations (`evaluate.verbaliser`). Metrics: those of `classify`.
    """
    project = partial(project_with, model)

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        B, C, T = batch["tokens"].shape
        names = ("tokens", "targets", "segment_ids", "counted")
        flat = {name: batch[name].reshape(B * C, T) for name in names}
        hidden = states(model, params, flat, rng)
        own = token_log_probs(
            project, head_params(params), hidden, flat["targets"], flat["counted"], chunk
        )
        return _of_examples(own.sum(-1).reshape(B, C), batch["labels"], batch["weights"])

    return objective


def preference(model: Any, loss: PairLoss, chunk: int | None = None) -> Objective:
    """Σ weights · loss of pairs of answers (`losses.preference`).

    The batch holds tokens, targets, weights, segment_ids and positions [P, T] as `data.preferences`
    lays pairs out; pair_weights [P]; and reference [P, 2], the reference's log-probabilities of both
    answers (`answer_log_probs`), where the loss looks at one. Metrics over pairs of non-zero weight: loss, accuracy
    (margin above 0), margin of log-ratios, and the two log-probabilities, chosen and rejected.
    """

    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        sums, tokens = answer_log_probs(model, params, batch, rng, chunk)
        reference = batch.get("reference", jnp.zeros_like(sums))
        pairs = Pairs(*sums.T, *reference.T, *tokens.T)
        losses, counted = loss(pairs), (batch["pair_weights"] != 0).astype(jnp.float32)
        found = {
            "loss": losses,
            "accuracy": (pairs.margin > 0).astype(jnp.float32),
            "margin": pairs.margin,
            "chosen": pairs.chosen,
            "rejected": pairs.rejected,
        }
        metrics = {name: Mean.of(value, counted) for name, value in found.items()}
        return (losses * batch["pair_weights"]).sum(), jax.lax.stop_gradient(metrics)

    return objective


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


def with_penalty(objective: Objective, penalty: Penalty) -> Objective:
    """The objective plus `penalty(params, context, rng)`; both report their metrics.

    A penalty does not scale with the batch: where a step is split into n parts that are added, it
    must be given as 1/n of its value.
    """

    def penalised(params: Params, context: Any, batch: Batch, rng: Array | None):
        loss, metrics = objective(params, context, batch, rng)
        value, more = penalty(params, context, rng)
        clash = metrics.keys() & more.keys()
        if clash:
            raise ValueError(f"penalty and objective both report {sorted(clash)}")
        return loss + value, metrics | more

    return penalised


def states(model: Any, params: Params, batch: Batch, rng: Array | None = None) -> Array:
    """The states [B, T, D] before the head, of a batch as `next_token` takes it."""
    inputs = [batch[name] for name in ("source", "tokens") if name in batch]
    more = ("source_positions", "source_segment_ids")
    return model.apply(
        {"params": params},
        *inputs,
        **{name: batch[name] for name in more if name in batch},
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        rngs=None if rng is None else {"dropout": rng},
        method="hidden",
    )


def head_outputs(
    model: Any, head: Head, params: Params, batch: Batch, rng: Array | None = None
) -> Array:
    """What a head that was added says of each row, [B, C]."""
    return head(params, states(model, params, batch, rng), batch.get("segment_ids"))


def head_params(params: Params) -> Params:
    """The subtree that `project` reads: `head`, or the embedding table it is tied to."""
    name = "head" if "head" in params else "embed"
    return {name: params[name]}


def project_with(model: Any, head: Params, hidden: Array) -> Array:
    """hidden [..., D] -> logits [..., V] with the parameters of `head_params`.

    No dropout reaches the head (a LoRA on the head trains without it): one key would give every
    chunk of positions the same mask.
    """
    return model.apply({"params": head}, hidden, method="project")


def _of_examples(scores: Array, labels: Array, weights: Array) -> tuple[Array, dict[str, Mean]]:
    loss, metrics = cross_entropy(scores, labels, weights)
    metrics["examples"] = metrics.pop("tokens")
    return loss, metrics
