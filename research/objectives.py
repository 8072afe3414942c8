"""Losses bound to models: what the training step differentiates.

An Objective is `(params, context, batch, rng) -> (loss, {name: Mean})`, see `research.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from research.losses.lm import cross_entropy, fused_cross_entropy
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
