"""What objectives and measures ask of a model: states, the head's parameters, logits."""

from __future__ import annotations

from typing import Any

from research.models.heads import Head
from research.types import Array, Batch, Params


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
