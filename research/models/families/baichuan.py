"""Baichuan-7B and 13B, Baichuan 2-7B and 13B in the layout of their original code.

Yang et al. 2023, Baichuan 2 (arXiv:2309.10305). LLaMA 1 (eps 1e-6, no biases) with 64,000 pieces
and q, k and v in one tensor W_pack; the 13Bs have ALiBi in the place of RoPE; Baichuan 2 has
125,696 pieces and a head whose rows are normalised (`NormHead`). Its max-z loss is
`losses.lm`'s `max_z_loss`.

What a config.json says, and what is concluded:

    ALiBi or RoPE  The 7Bs' code has the field max_position_embeddings, the 13Bs' has model_max_length
                   alone; so the field max_position_embeddings means RoPE, its absence ALiBi.
                   A config that says otherwise of a published width (4096: RoPE, 5120: ALiBi) is
                   refused, and so is architecture BaiChuanForCausalLM (the first 7B's) without it.
    NormHead       where there is the field z_loss_weight, which Baichuan 2's code brought, or the
                   vocabulary has Baichuan 2's 125,696 pieces. z_loss_weight is written as 0: the
                   loss is not part of the model.

A Baichuan-7B is a LLaMA: `config=llama.to_huggingface(pretrained.model.config)` saves it as one. A
Baichuan 2-7B is after `fold_head`. No class of transformers has ALiBi in a LLaMA: a 13B is saved
in its own layout only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

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
from research.models.layers import Linear, NormHead
from research.models.position import Alibi, Rope
from research.types import Params
from research.weights.base import dense

ARCHITECTURES = ("BaichuanForCausalLM", "BaiChuanForCausalLM")
SECOND_VOCABULARY = 125_696
PUBLISHED_POSITIONS = {4096: Rope(), 5120: Alibi()}


def baichuan(
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    ffn: int,
    *,
    norm_head: bool = False,
    **more: Any,
) -> DecoderConfig:
    """A Baichuan of any size; `more` are further arguments of `llama`, position=Alibi() above all."""
    given = {"eps": 1e-6, "max_length": 4096, **more}
    config = llama.llama(vocab_size, layers, width, heads, heads, ffn, **given)
    return dataclasses.replace(config, head=NormHead(vocab_size)) if norm_head else config


_7B, _13B = (32, 4096, 32, 11_008), (40, 5120, 40, 13_696)

PRESETS: dict[str, DecoderConfig] = {
    "baichuan-7b": baichuan(64_000, *_7B),
    "baichuan-13b": baichuan(64_000, *_13B, position=Alibi()),
    "baichuan2-7b": baichuan(SECOND_VOCABULARY, *_7B, norm_head=True),
    "baichuan2-13b": baichuan(SECOND_VOCABULARY, *_13B, norm_head=True, position=Alibi()),
}


def name_map(config: DecoderConfig) -> list[Entry]:
    """Our leaves and the names of the original code: a LLaMA's, but for W_pack."""
    return llama.name_map(config, block_names)


def block_names(block: Block) -> list[Entry]:
    width = block.attention.heads * block.attention.head_size
    thirds = {f"attention/{name}/kernel": width for name in "qkv"}
    apart = [entry for entry in llama.llama_block_names(block) if entry.path not in thirds]
    return apart + packed("self_attn.W_pack.weight", thirds, transpose=True)


def from_huggingface(config: dict) -> DecoderConfig:
    """config.json's dictionary -> DecoderConfig. ConfigError for what would change the result."""
    refuse(config, "hidden_act", "silu")
    refuse(config, "tie_word_embeddings", False)
    refuse(config, "quantization_config", None)
    refuse(config, "rope_scaling", None)
    vocab_size, width = require(config, "vocab_size"), require(config, "hidden_size")
    position = _position_from(config, width)
    length = "model_max_length" if isinstance(position, Alibi) else "max_position_embeddings"
    return baichuan(
        vocab_size,
        require(config, "num_hidden_layers"),
        width,
        require(config, "num_attention_heads"),
        require(config, "intermediate_size"),
        norm_head="z_loss_weight" in config or vocab_size == SECOND_VOCABULARY,
        eps=require(config, "rms_norm_eps"),
        position=position,
        max_length=require(config, length),
    )


def _position_from(config: dict, width: int) -> Rope | Alibi:
    """As the module's docstring says."""
    said = Rope() if "max_position_embeddings" in config else Alibi()
    first_7b = "BaiChuanForCausalLM" in (config.get("architectures") or [])
    if PUBLISHED_POSITIONS.get(width, said) != said or (first_7b and said == Alibi()):
        has = "has" if said == Rope() else "lacks"
        raise ConfigError(
            f"config.json: hidden_size = {width} of {config.get('architectures')} "
            f"{has} max_position_embeddings. A 7B has the field, for its RoPE; a 13B has "
            "model_max_length alone, and ALiBi"
        )
    return said


def to_huggingface(config: DecoderConfig) -> dict:
    """The dictionary of a config.json for the original code; ConfigError for what it cannot do."""
    block, rope = config.stacks[0].pattern[0], isinstance(config.position, Rope)
    second = isinstance(config.head, NormHead)
    described = {
        "architectures": [ARCHITECTURES[1 if rope and not second else 0]],
        "model_type": "baichuan",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": block.attention.heads,
        "intermediate_size": block.ffn.features,
        "hidden_act": "silu",
        "rms_norm_eps": block.norm.eps,
        "tie_word_embeddings": False,
        **({"max_position_embeddings": config.max_length} if rope else {}),
        **({"model_max_length": config.max_length} if second or not rope else {}),
        **({"z_loss_weight": 0} if second else {}),
    }
    require_same(config, from_huggingface(described), described["architectures"][0])
    return described


def fold_head(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """The same function with a Linear that holds NormHead's normalised matrix.

    For decoding, which then reads the head once and not twice a token, and for LLaMA's layout. Not
    for training: nothing keeps the rows at length 1.
    """
    if not isinstance(config.head, NormHead):
        raise ValueError(f"the head is no NormHead but {config.head}")
    kernel = dense(params["head"]["kernel"])
    squares = jnp.square(kernel.astype(jnp.float32)).sum(axis=0)
    length = jnp.sqrt(jnp.maximum(squares, config.head.eps**2))
    unit = (kernel.astype(jnp.float32) / length).astype(kernel.dtype)
    plain = Linear(config.vocab_size, ("embed", "vocab"))
    return dataclasses.replace(config, head=plain), {**params, "head": {"kernel": unit}}
