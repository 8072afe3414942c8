"""The first layers of SmolLM2-135M-Instruct as a smaller real model, and the way back into the whole.

    small = first_layers(smollm2_instruct(), 6)               # Pretrained, embeddings and final norm too
    params = put_back(smollm2_instruct().params, small.params)

Classification is learned in a part of the time on it. It is no language model: the layer that its
final norm and tied head follow is not the one that they were trained behind. What tuning did to
language is measured with the layers back in their place.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp

from research import hub
from research.hub.download import smollm2
from research.hub.pretrained import Pretrained
from research.types import Params


@cache
def smollm2_instruct() -> Pretrained:
    """The whole model, read once a process: a sweep of short runs would mostly read it."""
    return hub.load(smollm2())


def first_layers(pretrained: Pretrained, count: int) -> Pretrained:
    """The model of the first `count` layers, with all that stands before and after them.

    ValueError for a count that is not in 1..layers, and for a model that is not one stack of one
    repeated block.
    """
    config = pretrained.model.config
    if len(config.stacks) != 1 or len(config.stacks[0].pattern) != 1:
        raise ValueError("first_layers: expected one stack of one repeated block")
    if not 1 <= count <= config.layers:
        raise ValueError(f"first_layers: count must be in 1..{config.layers}, got {count}")
    stack = dataclasses.replace(config.stacks[0], count=count)
    kept = jax.tree.map(lambda leaf: leaf[:count], pretrained.params["stack_0"])
    return dataclasses.replace(
        pretrained,
        model=pretrained.model.clone(config=dataclasses.replace(config, stacks=(stack,))),
        params={**pretrained.params, "stack_0": kept},
        config={**pretrained.config, "num_hidden_layers": count},
    )


@cache
def smollm2_layers(count: int | None) -> Pretrained:
    """Its first `count` layers, all of them with None; made once a process."""
    whole = smollm2_instruct()
    return whole if count is None else first_layers(whole, count)


def put_back(whole: Params, first: Params) -> Params:
    """The whole model's parameters with the embeddings and first layers of `first` in their place.

    The final norm stays the whole model's. Neither may hold adapters.
    """

    def joined(own: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.concatenate([other, own[len(other) :]])

    stack = jax.tree.map(joined, whole["stack_0"], first["stack_0"])
    return {**whole, "embed": first["embed"], "stack_0": stack}
