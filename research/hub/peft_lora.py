"""LoRA and DoRA in PEFT's directories.

Every adapted module has two matrices, lora_A.weight [R, in] and lora_B.weight [out, R], the
transposes of our a [in, R] and b [R, out] (for an embedding lora_embedding_A [R, V] and
lora_embedding_B [D, R]), and with `use_dora` the vector lora_magnitude_vector [out].

Ours are stacked over layers and have one scale for all. An adapter whose rank or alpha differs
between layers is read exactly by padding ranks with zeros and folding the ratio of scales into b;
a layer that it leaves out gets zeros, and for DoRA the lengths of its matrix's columns.

A LoRA knows its scale but not where it came from. `use_rslora`, alpha / sqrt(R) for alpha / R, is
written where the alphas are rounder or fewer with it; the function is the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.hub import peft_modules as modules
from research.hub.checkpoint import CheckpointError
from research.hub.peft_config import fields_to_save, plain
from research.hub.peft_modules import Found, Parts, Site
from research.hub.pretrained import Pretrained
from research.weights.base import dense
from research.weights.dora import DoRA
from research.weights.lora import LoRA

MAGNITUDE = "lora_magnitude_vector"


def read(
    pretrained: Pretrained, file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Pretrained:
    """The model with the LoRAs, or with `use_dora` the DoRAs, of a directory."""

    def parts(site: Site, layer: int | None) -> Parts:
        more = {MAGNITUDE: site.shape[-1:]} if config.get("use_dora") else {}
        return factor_shapes(site) | more

    def build(site: Site, found: list[Found]) -> LoRA | DoRA:
        node = stack(file, site, found, config)
        if not config.get("use_dora"):
            return node
        magnitude = stacked_magnitude(site, found)
        return DoRA(node.base, node.a, node.b, magnitude, node.scale, node.dropout)

    return modules.put_on(pretrained, file, tensors, parts, build)


def factor_shapes(site: Site) -> dict[str, tuple[int | str, ...]]:
    inner, outer = site.shape[-2:]
    name_a, name_b = factor_names(site)
    return {name_a: ("R", inner), name_b: (outer, "R")}


def factor_names(site: Site) -> tuple[str, str]:
    if site.is_table:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def stack(file: Path, site: Site, found: list[Found], config: dict[str, Any]) -> LoRA:
    """One LoRA from the factors of each layer."""
    name_a, name_b = factor_names(site)
    rank = max(len(one[name_a]) for one in found if one is not None)
    a = np.zeros((len(found), site.shape[-2], rank), np.float32)
    b = np.zeros((len(found), rank, site.shape[-1]), np.float32)
    scale = None
    for index, (layer, one) in enumerate(zip(site.layers, found, strict=True)):
        if one is None:
            continue
        own_rank = len(one[name_a])
        own_scale = scale_of(file, config, site.module(layer), own_rank)
        scale = own_scale if scale is None else scale
        a[index, :, :own_rank] = one[name_a].T
        b[index, :own_rank] = one[name_b].T.astype(np.float32) * (own_scale / scale)
    if not site.entry.stacked:
        a, b = a[0], b[0]
    dropout = float(config.get("lora_dropout") or 0.0)
    return LoRA(site.leaf, jnp.asarray(a), jnp.asarray(b), scale, dropout)


def stacked_magnitude(site: Site, found: list[Found]) -> jax.Array:
    """[L, out], or [out] for a matrix that is not stacked."""
    rows = []
    for layer, one in zip(site.layers, found, strict=True):
        if one is None:
            base = dense(jax.tree.map(lambda x, at=layer: x[at], site.leaf))
            rows.append(jnp.linalg.norm(base.astype(jnp.float32), axis=-2))
        else:
            rows.append(jnp.asarray(one[MAGNITUDE], jnp.float32))
    return jnp.stack(rows) if site.entry.stacked else rows[0]


def scale_of(file: Path, config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / R, or alpha / sqrt(R) with use_rslora; CheckpointError for another rank than R."""
    said = matching(config.get("rank_pattern"), module, config["r"])
    if said != rank:
        raise CheckpointError(
            f"{file}: the factors of {module} have rank {rank}; expected {said} "
            "(r or rank_pattern of adapter_config.json)"
        )
    alpha = matching(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def matching(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that fits the module's name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def write(directory: Any, pretrained: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of a model with LoRAs."""
    here = modules.adapted(directory, pretrained, "LoRA", LoRA)
    for site in here:
        if site.leaf.residual:
            raise CheckpointError(
                f"{directory}: {site.path} has a base that its LoRA's beginning changed (PiSSA, "
                "OLoRA): save what `lora.on_original` makes of it"
            )
    return written(directory, pretrained, here, use_dora=False)


def write_dora(
    directory: Any, pretrained: Pretrained
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of a model with DoRAs."""
    here = modules.adapted(directory, pretrained, "DoRA", DoRA)
    return written(directory, pretrained, here, use_dora=True)


def written(
    directory: Any, pretrained: Pretrained, here: list[Site], use_dora: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if pretrained.model.config.head is None and any(site.is_table for site in here):
        raise CheckpointError(f"{directory}: {modules.TIED}")
    if len({site.leaf.dropout for site in here}) > 1:
        raise CheckpointError(f"{directory}: dropout differs between matrices; PEFT has one")
    modules.require_even(
        directory, here, "(rank, scale)", lambda node: (node.a.shape[-1], node.scale)
    )

    def parts(site: Site, node: Any) -> dict[str, np.ndarray]:
        factors = dict(zip(factor_names(site), (node.a.T, node.b.T), strict=True))
        return factors | ({MAGNITUDE: node.magnitude} if use_dora else {})

    config = config_to_save(here, modules.short_names(pretrained, here))
    return config | {"use_dora": use_dora}, modules.tensors_to_save(here, parts)


def config_to_save(here: list[Site], ends: dict[str, str]) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha, and patterns for the others."""
    ranks = {site.path: site.leaf.a.shape[-1] for site in here}
    use_rslora, alphas = alphas_to_save({site.path: site.leaf.scale for site in here}, ranks)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return fields_to_save(
        "LORA",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=here[0].leaf.dropout,
        bias="none",
        fan_in_fan_out=False,
        use_rslora=use_rslora,
        target_modules=sorted(set(ends.values())),
        rank_pattern={ends[path]: r for path, r in ranks.items() if r != rank},
        alpha_pattern={ends[path]: a for path, a in alphas.items() if a != alpha},
    )


def alphas_to_save(
    scales: dict[str, float], ranks: dict[str, int]
) -> tuple[bool, dict[str, int | float]]:
    """use_rslora and {path: alpha}: whichever form has fewer odd alphas, else fewer alphas."""
    forms = {
        False: {path: plain(scale * ranks[path]) for path, scale in scales.items()},
        True: {path: plain(scale * math.sqrt(ranks[path])) for path, scale in scales.items()},
    }

    def cost(use_rslora: bool) -> tuple[int, int, bool]:
        alphas = set(forms[use_rslora].values())
        return sum(isinstance(alpha, float) for alpha in alphas), len(alphas), use_rslora

    best = min(forms, key=cost)
    return best, forms[best]
