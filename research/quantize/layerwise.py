"""A model made anew layer by layer, from below: what GPTQ and layer-by-layer distillation share.

    walk(model, params, windows, change)     # -> params

    change(layer, its parameters, states, teacher) -> its new parameters

`states` are what the layer reads when all layers below are new already, `teacher` (where it is asked
for) what it reads in the model as it was. Of all windows only the states between two layers are kept.

A layer's parameters have the paths that they have in the model: a tree {stack_0: {block_0: ...}} of that
layer alone, without the layer axis, so that path rules mean the same and errors name what they should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.models import stack as stacks
from research.models.attention import Inputs
from research.models.block import Block
from research.models.decoder import Decoder
from research.paths import named_leaves, require_match
from research.quantize import calibrate
from research.types import Array, Params
from research.weights import observed
from research.weights.base import is_weight

# Of each batch of windows the states [B, T, D] and what the layers share.
States = list[tuple[Array, Inputs]]


@dataclass(frozen=True)
class Layer:
    """The layer `index` of those that stand at one path. Layers of one path are equal, so that what is
    compiled for one serves all."""

    stack: str
    place: str
    block: Block
    index: int = field(compare=False)

    @property
    def path(self) -> str:
        return f"{self.stack}/{self.place}"

    def __str__(self) -> str:
        return f"{self.path}[{self.index}]"

    def own(self, params: Params) -> Params:
        """{stack_0: {block_0: ...}}: its parameters, of the model's."""
        tree = stacks.layer(params[self.stack], self.index)
        return {self.stack: {self.place: tree[self.place]}}


Change = Callable[[Layer, Params, States, States | None], Params]
Progress = Callable[[Layer], None]


def layers_of(model: Decoder) -> list[Layer]:
    """All layers, the lowest first."""
    return [
        Layer(f"stack_{number}", f"block_{place}", block, index)
        for number, stack in enumerate(model.config.stacks)
        for index in range(stack.count)
        for place, block in enumerate(stack.pattern)
    ]


def walk(
    model: Decoder,
    params: Params,
    windows: np.ndarray,
    change: Change,
    batch_size: int = 4,
    with_teacher: bool = False,
    progress: Progress | None = None,
) -> Params:
    """`params` whose layers are what `change` makes of them, stacked as they were given.

    windows [n, T] of tokens, without padding. What stands outside of the layers stays as it is.
    `progress` is called after each layer. ValueError without a window, and for a model whose rows
    begin with what no token says (a prefix).
    """
    if model.before:
        raise ValueError(f"a {type(model).__name__} has a prefix, which no layer alone can read")
    states = enter(model, params, windows, batch_size)
    teacher, made = states if with_teacher else None, {}
    for layer in layers_of(model):
        own = layer.own(params)
        new = change(layer, own, states, teacher)
        states = run(layer, new, states)
        teacher = run(layer, own, teacher) if with_teacher else None
        at = made.setdefault(layer.stack, {}).setdefault(layer.place, [])
        at.append(new[layer.stack][layer.place])
        if progress is not None:
            progress(layer)
    return {**params, **{name: _like(params[name], new) for name, new in made.items()}}


def enter(model: Decoder, params: Params, windows: np.ndarray, batch_size: int = 4) -> States:
    """What the first layer reads."""
    batches = calibrate.batches_of(windows, batch_size)
    return [model.apply({"params": params}, ids, method="enter")[:2] for ids in batches]


def run(layer: Layer, params: Params, states: States) -> States:
    """What the next layer reads. `params` are the layer's own."""
    return [(_run(layer, params, batch), batch[1]) for batch in states]


def measure(
    layer: Layer,
    params: Params,
    states: States,
    rule: str,
    measurement: observed.Measure,
    combine: Callable[[Array, Array], Array],
) -> calibrate.Statistics:
    """`calibrate.measure` of one layer that reads `states`."""
    watched = observed.add(params, rule, measurement)
    return calibrate.gather(apply, layer, watched, states, combine)


def apply(layer: Layer, params: Params, batch: tuple[Array, Inputs]) -> Array:
    """A batch of states [B, T, D] through a layer that has these parameters."""
    x, inputs = batch
    # Rows are read at once. 0 is no array then, so that kernels can skip what a causal mask hides.
    inputs = inputs.replace(mask=inputs.mask.replace(offset=0))
    return layer.block.apply({"params": params[layer.stack][layer.place]}, x, inputs)[0]


_run = partial(jax.jit, static_argnums=0)(apply)


def require_inside(model: Decoder, params: Params, rule: str) -> list[str]:
    """The paths in layers that the rule matches. RuleError when it matches nothing, ValueError when
    it matches what stands outside of the layers."""
    outside = {name: node for name, node in params.items() if not name.startswith("stack_")}
    trees = [outside, *(layer.own(params) for layer in layers_of(model) if layer.index == 0)]
    names = [[name for name, _ in named_leaves(tree, is_leaf=is_weight)] for tree in trees]
    found = require_match(rule, [name for some in names for name in some])
    if alien := sorted(set(found) & set(names[0])):
        raise ValueError(
            f"layer by layer, {rule!r} must match only matrices of layers, not {alien}"
        )
    return found


def _like(given: Any, made: dict[str, list[Params]]) -> Any:
    """Layers {block_0: [...]} as one tree each, or stacked, as the `given` ones are."""
    apart = tuple(dict(zip(made, one, strict=True)) for one in zip(*made.values(), strict=True))
    if isinstance(given, tuple):
        return apart
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
