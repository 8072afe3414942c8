"""(IA)^3 in PEFT's directories.

Every adapted module has one tensor, ia3_l: [out, 1] where outputs are scaled, [1, in] where inputs
are, which `feedforward_modules` names. Ours is a vector for each layer; a layer that the adapter
leaves out gets ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.hub import peft_modules as modules
from research.hub.checkpoint import CheckpointError
from research.hub.peft_config import CONFIG, fields_to_save
from research.hub.peft_modules import Found, Parts, Site
from research.hub.pretrained import Pretrained
from research.paths import named_leaves
from research.weights.base import is_weight
from research.weights.bias import bias_beside
from research.weights.ia3 import ScaledInput, ScaledOutput

VECTOR = "ia3_l"


def read(
    pretrained: Pretrained, file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Pretrained:
    """The model with the vectors of a directory."""
    scales_input = input_rule(file, config)
    leaves = dict(named_leaves(pretrained.params, is_leaf=is_weight))

    def parts(site: Site, layer: int | None) -> Parts:
        if site.is_table:  # PEFT has none
            return {}
        inner, outer = site.shape[-2:]
        return {VECTOR: (1, inner) if scales_input(site.module(layer)) else (outer, 1)}

    def build(site: Site, found: list[Found]) -> ScaledInput | ScaledOutput:
        sides = {
            scales_input(site.module(layer))
            for layer, one in zip(site.layers, found, strict=True)
            if one is not None
        }
        if len(sides) > 1:
            raise CheckpointError(
                f"{file.parent / CONFIG}: feedforward_modules names some layers of {site.module()} "
                "and not others: not implemented"
            )
        if sides.pop():
            return ScaledInput(site.leaf, stack(site, found, site.shape[-2]))
        scale = stack(site, found, site.shape[-1])
        return ScaledOutput(site.leaf, scale, leaves.get(bias_beside(site.path)))

    return modules.put_on(pretrained, file, tensors, parts, build)


def input_rule(file: Path, config: dict[str, Any]) -> Any:
    """Of a module's name: whether its inputs are scaled. As PEFT matches `feedforward_modules`."""
    rule = config.get("feedforward_modules")
    if isinstance(rule, str):
        return lambda module: re.fullmatch(rule, module) is not None
    if not isinstance(rule, list) or not all(isinstance(end, str) for end in rule):
        raise CheckpointError(
            f"{file.parent / CONFIG}: feedforward_modules = {rule!r}; expected a list of names or "
            "an expression"
        )
    return lambda module: module.endswith(tuple(rule))


def stack(site: Site, found: list[Found], size: int) -> jnp.ndarray:
    """[L, size], or [size] for a matrix that is not stacked."""
    rows = [np.ones(size) if one is None else one[VECTOR].reshape(-1) for one in found]
    vectors = jnp.asarray(np.stack(rows), jnp.float32)
    return vectors if site.entry.stacked else vectors[0]


def write(directory: Any, pretrained: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of a model with (IA)^3."""
    here = modules.adapted(directory, pretrained, "(IA)^3", ScaledOutput, ScaledInput)
    for site in here:
        if site.is_table:
            raise CheckpointError(
                f"{directory}: {site.path} is an embedding, on which PEFT has no (IA)^3: merge it"
            )
    modules.require_even(directory, here, "what is scaled", lambda node: type(node).__name__)

    def parts(site: Site, node: ScaledInput | ScaledOutput) -> dict[str, np.ndarray]:
        column = isinstance(node, ScaledOutput)
        return {VECTOR: node.scale[:, None] if column else node.scale[None, :]}

    ends = modules.short_names(pretrained, here)
    inputs = {ends[site.path] for site in here if isinstance(site.leaf, ScaledInput)}
    config = fields_to_save(
        "IA3",
        fan_in_fan_out=False,
        target_modules=sorted(set(ends.values())),
        feedforward_modules=sorted(inputs),
    )
    return config, modules.tensors_to_save(here, parts)
