"""Heads that read a whole sequence: scores of classes, or numbers, from a decoder's states.

The states [B, T, D] of `method="hidden"` are pooled to one [B, D] and multiplied by `score/kernel`
[D, C], which stands beside the decoder's own parameters. With `last_token` and no bias it is
transformers' ...ForSequenceClassification (GPT-1, Radford et al. 2018, section 3.2, reads the last
token too); `masked_mean` is the other usual pooling. A row is one example: rows are padded, on
either side, and never packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from research.types import Array, Params
from research.weights import base

# (states [B, T, D], segment_ids [B, T]) -> [B, D]
Pool = Callable[[Array, Array], Array]

TRAINABLE = r"score/.*"  # the head alone, as a path rule for `partition`


def last_token(hidden: Array, segment_ids: Array) -> Array:
    """The state of the last token that is not padding; of the first place where all is padding."""
    places = jnp.arange(segment_ids.shape[1])
    last = jnp.where(segment_ids != 0, places[None], 0).max(axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def masked_mean(hidden: Array, segment_ids: Array) -> Array:
    """The mean state of the tokens that are not padding, summed in float32; 0 where all is padding."""
    real = (segment_ids != 0)[..., None]
    total = jnp.where(real, hidden, 0).sum(axis=1, dtype=jnp.float32)
    return (total / jnp.maximum(real.sum(axis=1), 1)).astype(hidden.dtype)


@dataclass(frozen=True)
class Head:
    """C `outputs` of a pooled state: scores of classes, or the numbers of a regression."""

    outputs: int
    pool: Pool = last_token
    bias: bool = False
    init_std: float = 0.02

    def __call__(self, params: Params, hidden: Array, segment_ids: Array | None = None) -> Array:
        """states [B, T, D] -> [B, C] float32 with the head of `params`; without segments all
        tokens count. ValueError when there is no head, or one of another size."""
        if "score" not in params:
            raise ValueError("the parameters have no score/kernel: heads.add puts one there")
        kernel = params["score"]["kernel"]
        if (columns := jax.eval_shape(base.dense, kernel).shape[-1]) != self.outputs:
            raise ValueError(f"score/kernel has {columns} outputs, the head says {self.outputs}")
        if segment_ids is None:
            segment_ids = jnp.ones(hidden.shape[:2], jnp.int32)
        outputs = base.matmul(self.pool(hidden, segment_ids), kernel)
        if self.bias:
            outputs = outputs + params["score"]["bias"].astype(outputs.dtype)
        return outputs.astype(jnp.float32)


def add(params: Params, head: Head, width: int, rng: Array) -> Params:
    """`params` with a fresh head for states of `width`; ValueError when there is one already."""
    if "score" in params:
        raise ValueError("the parameters have a head at score/ already")
    score = {"kernel": head.init_std * jax.random.normal(rng, (width, head.outputs))}
    if head.bias:
        score["bias"] = jnp.zeros(head.outputs)
    return {**params, "score": score}


def axes(head: Head) -> Params:
    """Logical axis names of what `add` puts there, to stand beside those of `decoder.axes`."""
    score = {"kernel": ("embed", None)}
    return {"score": score | ({"bias": (None,)} if head.bias else {})}


def remove(params: Params) -> Params:
    """The decoder's own parameters."""
    return {name: value for name, value in params.items() if name != "score"}
