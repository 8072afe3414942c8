"""GLM-4-9B as transformers has it, and the architecture that ChatGLM2 and ChatGLM3 share with it.

GLM Team 2024 (arXiv:2406.12793). A LLaMA but for four things: biases on q, k and v only, two
key/value heads, RoPE on the first half of each head's features, in neighbouring pairs, and gate and
up of the feed-forward in one tensor. A plain causal model: prompts begin with [gMASK] sop.

The layout here is GlmForCausalLM; `chatglm` has those of the original code. A ChatGLM2 or 3 loaded
from there is saved as a GlmForCausalLM with `config=glm.to_huggingface(pretrained.model.config)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from research.models.block import Block
from research.models.decoder import DecoderConfig
from research.models.families import llama
from research.models.families.checkpoint import (
    ConfigError,
    Entry,
    packed,
    refuse,
    require,
    require_same,
)
from research.models.families.fields import Fields
from research.models.families.rope_fields import rope_from
from research.models.position import Rope

ARCHITECTURES = ("GlmForCausalLM",)


def glm(*sizes: int, bias: bool = True, theta: float = 1e4, **more: Any) -> DecoderConfig:
    """A GLM of any size, with the arguments of `llama`; bias: on q, k and v."""
    given = {"position": Rope(theta, fraction=0.5, interleaved=True), **more}
    return llama.llama(*sizes, attention_bias=bias, out_bias=False, **given)


_GLM4 = {"head_size": 128, "eps": 1.5625e-07}

PRESETS: dict[str, DecoderConfig] = {
    "glm-4-9b": glm(151_552, 40, 4096, 32, 2, 13_696, max_length=8192, **_GLM4),
    "glm-4-9b-chat": glm(151_552, 40, 4096, 32, 2, 13_696, max_length=131_072, theta=5e6, **_GLM4),
}


def name_map(config: DecoderConfig) -> list[Entry]:
    """Our leaves and the names that transformers' GlmForCausalLM gives them."""
    return llama.name_map(config, block_names)


def block_names(block: Block) -> list[Entry]:
    halves = dict.fromkeys(("ffn/gate/kernel", "ffn/up/kernel"), block.ffn.features)
    apart = [entry for entry in llama.llama_block_names(block) if entry.path not in halves]
    return apart + packed("mlp.gate_up_proj.weight", halves, transpose=True)


def from_huggingface(config: dict) -> DecoderConfig:
    """config.json's dictionary -> DecoderConfig. ConfigError for what would change the result."""
    for name in ("head_dim", "num_key_value_heads", "attention_bias"):
        require(config, name)  # transformers' defaults are those of GLM-4-9B
    rope = dict(config.get("rope_parameters") or {})
    fraction = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    rest = Fields(config).but("partial_rotary_factor", rope_parameters=rope)
    given = llama.sizes_from(rest)
    given["position"] = dataclasses.replace(rope_from(rest), fraction=fraction, interleaved=True)
    sizes = [given.pop(n) for n in ("vocab_size", "layers", "width", "heads", "kv_heads", "ffn")]
    refuse(config, "mlp_bias", False, None)
    return glm(*sizes, bias=config["attention_bias"], **given)


def to_huggingface(config: DecoderConfig) -> dict:
    """The dictionary of a config.json that `transformers` opens as GlmForCausalLM.

    ConfigError naming the part when the config has one that GlmForCausalLM does not.
    """
    position = config.position
    if not isinstance(position, Rope) or not position.interleaved:
        raise ConfigError(f"{ARCHITECTURES[0]} needs interleaved Rope, not {position}")
    whole = dataclasses.replace(position, fraction=1.0, interleaved=False)
    described = {
        **llama.sizes_of(dataclasses.replace(config, position=whole), ARCHITECTURES[0]),
        "model_type": "glm",
        "attention_bias": config.stacks[0].pattern[0].attention.bias,
    }
    described["rope_parameters"]["partial_rotary_factor"] = position.fraction
    require_same(config, from_huggingface(described), ARCHITECTURES[0])
    return described
