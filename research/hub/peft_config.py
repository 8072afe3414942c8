"""adapter_config.json: which kind of adapter a PEFT directory holds, and what is refused of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from research.hub import huggingface
from research.hub.checkpoint import CheckpointError

CONFIG = "adapter_config.json"
# What changes the function and is not implemented here; a falsy value means it is off.
# fan_in_fan_out is none of it: it says how the base stores its matrices (GPT-2's Conv1D).
LORA_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
REFUSED = {
    "LORA": LORA_REFUSED,
    "ADALORA": (*LORA_REFUSED, "use_dora"),
    "IA3": ("modules_to_save",),
    "PROMPT_TUNING": ("modules_to_save",),
    "P_TUNING": ("modules_to_save",),
    "PREFIX_TUNING": ("modules_to_save",),
}
# Initialisations that leave the base weights alone (PiSSA, OLoRA, ... change them).
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
DECODER = {"num_transformer_submodules": (1, None)}  # 2 is an encoder–decoder's
ALLOWED = {
    "LORA": {"bias": ("none", None), "init_lora_weights": INITIALISATIONS},
    "ADALORA": {"bias": ("none", None)},
    "PROMPT_TUNING": DECODER,
    "P_TUNING": DECODER,
    "PREFIX_TUNING": DECODER,
}
POSITIVE = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "P_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens",),
}


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, when it describes a kind of adapter that is read here and no more.

    CheckpointError naming the field that is not supported, or not what it must be.
    """
    config = huggingface.read_json(directory / CONFIG)
    where, kind = directory / CONFIG, config.get("peft_type")
    if kind not in REFUSED:
        raise CheckpointError(f"{where}: peft_type {kind!r}; expected one of {tuple(REFUSED)}")
    for name in REFUSED[kind]:
        if config.get(name):
            raise CheckpointError(f"{where}: {name} = {config[name]!r} is not supported")
    for name, allowed in ALLOWED.get(kind, {}).items():
        if config.get(name) not in allowed:
            raise CheckpointError(f"{where}: {name} = {config[name]!r}; expected one of {allowed}")
    for name in POSITIVE.get(kind, ()):
        value, whole = config.get(name), name != "lora_alpha"
        fits = isinstance(value, int) or (isinstance(value, float) and not whole)
        if not fits or isinstance(value, bool) or value <= 0:
            wanted = "whole number" if whole else "number"
            raise CheckpointError(f"{where}: {name} = {value!r}; expected a {wanted} > 0")
    return config


def fields_to_save(peft_type: str, **fields: Any) -> dict[str, Any]:
    """adapter_config.json of a kind: what all kinds have in it, and `fields`."""
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        **fields,
    }


def plain(number: float) -> int | float:
    """8 for 8.0 (and for 7.999999999999999, which was 8 before a division)."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number
