"""AdaLoRA in PEFT's directories.

Every adapted module has lora_A [R, in], lora_E [R, 1] and lora_B [out, R]; its `ranknum` is not
saved, because it is always `init_r`. So scale = lora_alpha / (init_r + 1e-5), whatever the rank has
become. `rank_pattern` says of a module, with a truth value for each of the init_r triplets, which
of them the file still has; here the others come back with e = 0.

Written the same way: the triplets whose e is 0 are left out where some of the model's are not 0,
so A and B of a pruned triplet are lost (`train.checkpoint` keeps them). PEFT wants the schedule of
a training in the config, which is not known here: total_step = 1 stands for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.hub import peft_modules as modules
from research.hub.checkpoint import CheckpointError
from research.hub.peft_config import CONFIG, fields_to_save, plain
from research.hub.peft_modules import Found, Parts, Site
from research.hub.pretrained import Pretrained
from research.weights.adalora import AdaLoRA

MORE = 1e-5  # what PEFT adds to the rank that divides
A, E, B = "lora_A", "lora_E", "lora_B"


def read(
    pretrained: Pretrained, file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Pretrained:
    """The model with the AdaLoRAs of a directory."""
    masks = read_masks(file, config)
    used: set[str] = set()

    def parts(site: Site, layer: int | None) -> Parts:
        if site.is_table:  # PEFT has none
            return {}
        module, (inner, outer) = site.module(layer), site.shape[-2:]
        used.add(module)
        rank = int(masks[module].sum()) if module in masks else config["init_r"]
        return {A: (rank, inner), E: (rank, 1), B: (outer, rank)}

    def build(site: Site, found: list[Found]) -> AdaLoRA:
        return stack(site, found, config, masks)

    loaded = modules.put_on(pretrained, file, tensors, parts, build)
    if odd := sorted(masks.keys() - used):
        raise CheckpointError(
            f"{file.parent / CONFIG}: rank_pattern names {odd[0]}, which the model has not"
        )
    return loaded


def read_masks(file: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """{module: which of its init_r triplets the file has}."""
    masks, rank = {}, config["init_r"]
    for name, kept in (config.get("rank_pattern") or {}).items():
        module = name.removesuffix(".default").removesuffix(f".{E}")
        if not isinstance(kept, list) or len(kept) != rank:
            raise CheckpointError(
                f"{file.parent / CONFIG}: rank_pattern of {name} is {kept!r}; expected a list of "
                f"init_r = {rank} truth values"
            )
        masks[module] = np.asarray(kept, bool)
    return masks


def stack(
    site: Site, found: list[Found], config: dict[str, Any], masks: dict[str, np.ndarray]
) -> AdaLoRA:
    """One AdaLoRA from the triplets of each layer; those that a layer has no more are zeros."""
    rank, (inner, outer) = config["init_r"], site.shape[-2:]
    a = np.zeros((len(found), inner, rank), np.float32)
    e = np.zeros((len(found), rank), np.float32)
    b = np.zeros((len(found), rank, outer), np.float32)
    for index, (layer, one) in enumerate(zip(site.layers, found, strict=True)):
        if one is not None:
            kept = masks.get(site.module(layer), np.ones(rank, bool))
            a[index, :, kept], e[index, kept], b[index, kept] = one[A], one[E][:, 0], one[B].T
    if not site.entry.stacked:
        a, e, b = a[0], e[0], b[0]
    scale, dropout = config["lora_alpha"] / (rank + MORE), float(config.get("lora_dropout") or 0.0)
    return AdaLoRA(site.leaf, jnp.asarray(a), jnp.asarray(e), jnp.asarray(b), scale, dropout)


def write(directory: Any, pretrained: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of a model with AdaLoRAs."""
    here = modules.adapted(directory, pretrained, "AdaLoRA", AdaLoRA)
    for site in here:
        if site.is_table:
            raise CheckpointError(
                f"{directory}: {site.path} is an embedding, on which PEFT has no AdaLoRA: save what "
                "`adalora.to_lora` makes of it"
            )
    numbers = {(s.leaf.a.shape[-1], s.leaf.scale, s.leaf.dropout) for s in here}
    if len(numbers) > 1:
        raise CheckpointError(
            f"{directory}: (rank, scale, dropout) of the AdaLoRAs are {sorted(numbers)}; PEFT has one "
            "of each: save what `adalora.to_lora` makes of them"
        )
    pruned = any(np.any(site.leaf.e) for site in here)

    def parts(site: Site, node: AdaLoRA) -> dict[str, np.ndarray]:
        kept = node.e != 0 if pruned else np.ones(node.e.shape, bool)
        return {A: node.a.T[kept], E: node.e[kept, None], B: node.b.T[:, kept]}

    config = config_to_save(here, modules.short_names(pretrained, here))
    if pruned:
        config["rank_pattern"] = rank_pattern(here)
    return config, modules.tensors_to_save(here, parts)


def rank_pattern(here: list[Site]) -> dict[str, list[bool]] | None:
    """{module of a layer and '.lora_E': which triplets are kept}; None when all are."""
    found = {}
    for site in here:
        kept = np.asarray(site.leaf.e != 0).reshape(-1, site.leaf.e.shape[-1])
        for layer, mask in zip(site.layers, kept, strict=True):
            found[f"{site.module(layer)}.{E}"] = mask.tolist()
    return None if all(all(mask) for mask in found.values()) else found


def config_to_save(here: list[Site], ends: dict[str, str]) -> dict[str, Any]:
    node = here[0].leaf
    rank = node.a.shape[-1]
    kept = sum(int(np.count_nonzero(site.leaf.e)) for site in here)
    count = sum(site.leaf.e.size // rank for site in here)
    return fields_to_save(
        "ADALORA",
        init_r=rank,
        target_r=max(1, round(kept / count)),
        total_step=1,
        lora_alpha=plain(node.scale * (rank + MORE)),
        lora_dropout=node.dropout,
        bias="none",
        fan_in_fan_out=False,
        target_modules=sorted(set(ends.values())),
        rank_pattern=None,
    )
