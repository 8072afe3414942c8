"""adapter_config.json: what PEFT says about a LoRA besides its factors, both ways."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from research.hub import huggingface
from research.hub.checkpoint import CheckpointError
from research.models.families.checkpoint import Entry
from research.weights.lora import LoRA

CONFIG = "adapter_config.json"
# What changes the function and is not implemented here; a falsy value means it is off.
REFUSED = [
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
]
# Initialisations that leave the base weights alone (PiSSA, OLoRA, ... change them).
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, when it describes nothing but LoRA."""
    config = huggingface.read_json(directory / CONFIG)
    where = directory / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type {config.get('peft_type')!r}; expected 'LORA'")
    for name in REFUSED:
        if config.get(name):
            raise CheckpointError(f"{where}: {name} = {config[name]!r} is not supported")
    for name, allowed in {"bias": ("none", None), "init_lora_weights": INITIALISATIONS}.items():
        if config.get(name) not in allowed:
            raise CheckpointError(f"{where}: {name} = {config[name]!r}; expected one of {allowed}")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or config[name] <= 0:
            raise CheckpointError(f"{where}: {name} = {config.get(name)!r}; expected a number > 0")
    return config


def module_of(entry: Entry, layer: int | None = None) -> str:
    return entry.name_of(layer).removesuffix(".weight")


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / R, or alpha / sqrt(R) with use_rslora."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def config_to_save(entries: dict[str, Entry], nodes: dict[str, LoRA]) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha, and patterns for the others."""
    ranks = {path: node.a.shape[-1] for path, node in nodes.items()}
    alphas = {path: plain(node.scale * ranks[path]) for path, node in nodes.items()}
    modules = {path: module_of(entry) for path, entry in entries.items()}  # of every layer at once
    ends = {path: short_name(modules[path], modules.values()) for path in nodes}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(nodes.values())).dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,  # the scale is alpha / r, whatever it came from
        "target_modules": sorted(ends.values()),
        "rank_pattern": {ends[path]: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {ends[path]: a for path, a in alphas.items() if a != alpha},
    }


def plain(number: float) -> int | float:
    """8 for 8.0 (and for 7.999999999999999, which was 8 before a division)."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


def short_name(module: str, others: Iterable[str]) -> str:
    """The fewest last words that no other module ends with: 'q_proj'."""
    words = module.split(".")
    for count in range(1, len(words)):
        end = ".".join(words[-count:])
        if not any(other.endswith(f".{end}") for other in others if other != module):
            return end
    return module
