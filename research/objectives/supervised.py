"""Objectives that know the right answer: next tokens, labels, numbers, one of several continuations."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp

from research.losses.lm import cross_entropy, fused_cross_entropy, token_log_probs
from research.models.heads import Head
from research.objectives.model import head_outputs, head_params, project_with, states
from research.types import Array, Batch, Mean, Objective, Params


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


def _of_examples(scores: Array, labels: Array, weights: Array) -> tuple[Array, dict[str, Mean]]:
    loss, metrics = cross_entropy(scores, labels, weights)
    metrics["examples"] = metrics.pop("tokens")
    return loss, metrics
