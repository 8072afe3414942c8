"""LLaMA 1, 2, 3, 3.1, 3.2 and SmolLM2: pre-norm RMSNorm, RoPE (half-split), SwiGLU, no biases.

Touvron et al. 2023 (arXiv:2302.13971), LLaMA 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783),
SmolLM2 (arXiv:2502.02737). What changes between generations:

    LLaMA 1    multi-head attention, eps 1e-6, 2048 tokens, 32,000 SentencePiece pieces
    LLaMA 2    eps 1e-5, 4096 tokens, 70B with 8 key/value heads
    LLaMA 3    8 key/value heads in all sizes, theta 5e5, 8192 tokens, 128,256 byte-level BPE pieces
    LLaMA 3.1  131,072 tokens by Llama3 frequency scaling, factor 8
    LLaMA 3.2  1B and 3B: factor 32, tied embeddings
    SmolLM2    a small LLaMA: 49,152 pieces, tied embeddings, theta 1e5 (1.7B: 1.3e5)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from research.models.attention import Attention, even_head_size
from research.models.block import Block
from research.models.decoder import DecoderConfig
from research.models.families.checkpoint import (
    ConfigError,
    Entry,
    placed,
    refuse,
    require,
    require_same,
)
from research.models.families.rope_fields import rope_from, rope_parameters
from research.models.layers import GatedMlp, Linear, RMSNorm
from research.models.position import Llama3, Rope
from research.models.stack import Stack, layers_of

ARCHITECTURES = ("LlamaForCausalLM",)


def llama(
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    *,
    head_size: int | None = None,
    eps: float = 1e-5,
    position: Rope = Rope(),
    max_length: int = 2048,
    tied: bool = False,
    attention_bias: bool = False,
    out_bias: bool | None = None,
    mlp_bias: bool = False,
    attention_dropout: float = 0.0,
    **parts: Any,
) -> DecoderConfig:
    """A LLaMA of any size; `parts` are further DecoderConfig fields (dtype, attend, remat, ...).

    attention_bias: on q, k and v, and on o unless `out_bias` says otherwise. ValueError when `heads`
    do not divide `width` and there is no `head_size`.
    """
    attention = Attention(
        heads,
        kv_heads,
        head_size or even_head_size(width, heads),
        bias=attention_bias,
        out_bias=attention_bias if out_bias is None else out_bias,
        dropout=attention_dropout,
    )
    block = Block(attention, GatedMlp(ffn, bias=mlp_bias), RMSNorm(eps))
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        stacks=(Stack(layers, (block,)),),
        max_length=max_length,
        position=position,
        final_norm=RMSNorm(eps),
        head=None if tied else Linear(vocab_size, ("embed", "vocab")),
        **parts,
    )


def _llama1(layers: int, width: int, heads: int, ffn: int) -> DecoderConfig:
    return llama(32_000, layers, width, heads, heads, ffn, eps=1e-6)


def _llama2(layers: int, width: int, heads: int, kv_heads: int, ffn: int) -> DecoderConfig:
    return llama(32_000, layers, width, heads, kv_heads, ffn, max_length=4096)


def _llama3(layers, width, heads, ffn, factor=None, **more) -> DecoderConfig:
    position = Rope(500_000.0, scaling=None if factor is None else Llama3(factor))
    length = 8192 if factor is None else 131_072
    return llama(
        128_256, layers, width, heads, 8, ffn, position=position, max_length=length, **more
    )


def _smollm2(layers, width, heads, kv_heads, ffn, theta=100_000.0) -> DecoderConfig:
    return llama(
        49_152,
        layers,
        width,
        heads,
        kv_heads,
        ffn,
        position=Rope(theta),
        max_length=8192,
        tied=True,
    )


PRESETS: dict[str, DecoderConfig] = {
    "llama-7b": _llama1(32, 4096, 32, 11008),
    "llama-13b": _llama1(40, 5120, 40, 13824),
    "llama-33b": _llama1(60, 6656, 52, 17920),
    "llama-65b": _llama1(80, 8192, 64, 22016),
    "llama-2-7b": _llama2(32, 4096, 32, 32, 11008),
    "llama-2-13b": _llama2(40, 5120, 40, 40, 13824),
    "llama-2-70b": _llama2(80, 8192, 64, 8, 28672),
    "llama-3-8b": _llama3(32, 4096, 32, 14336),
    "llama-3-70b": _llama3(80, 8192, 64, 28672),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14336, factor=8.0),
    "llama-3.1-70b": _llama3(80, 8192, 64, 28672, factor=8.0),
    "llama-3.1-405b": _llama3(126, 16384, 128, 53248, factor=8.0),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8192, factor=32.0, tied=True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 8192, factor=32.0, tied=True),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192, theta=130_000.0),
}


def llama_block_names(block: Block) -> list[Entry]:
    """The leaves of one block and the names of LlamaForCausalLM."""
    entries = [
        Entry("attention_norm/scale", "input_layernorm.weight"),
        Entry("ffn_norm/scale", "post_attention_layernorm.weight"),
    ]
    linears = [(f"attention/{x}", f"self_attn.{x}_proj", block.attention.bias) for x in "qkv"]
    linears += [("attention/o", "self_attn.o_proj", block.attention.out_bias)]
    linears += [(f"ffn/{x}", f"mlp.{x}_proj", block.ffn.bias) for x in ("gate", "up", "down")]
    for ours, theirs, bias in linears:
        entries.append(Entry(f"{ours}/kernel", f"{theirs}.weight", transpose=True))
        if bias:
            entries.append(Entry(f"{ours}/bias", f"{theirs}.bias"))
    return entries


def name_map(
    config: DecoderConfig, block_names: Callable[[Block], list[Entry]] = llama_block_names
) -> list[Entry]:
    """Our leaves and the names that Hugging Face's LlamaForCausalLM gives them.

    block_names: those of one block, for a family whose blocks alone are named otherwise.
    """
    entries = [
        Entry("embed/table", "model.embed_tokens.weight"),
        Entry("final_norm/scale", "model.norm.weight"),
    ]
    for path, first, step, block in layers_of(config.stacks):
        entries += placed(block_names(block), path, "model.layers.{layer}", first, step)
    if config.head is not None:
        entries.append(Entry("head/kernel", "lm_head.weight", transpose=True))
    return entries


def from_huggingface(config: dict) -> DecoderConfig:
    """config.json's dictionary -> DecoderConfig. ConfigError for what would change the result."""
    refuse(config, "pretraining_tp", 1)
    return llama(
        **sizes_from(config),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )


def sizes_from(config: dict) -> dict[str, Any]:
    """The arguments of `llama` that all families of its kind read from the same fields."""
    refuse(config, "hidden_act", "silu")
    heads = require(config, "num_attention_heads")
    return {
        "vocab_size": require(config, "vocab_size"),
        "layers": require(config, "num_hidden_layers"),
        "width": require(config, "hidden_size"),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "ffn": require(config, "intermediate_size"),
        "head_size": config.get("head_dim"),
        "eps": require(config, "rms_norm_eps"),
        "position": rope_from(config),
        "max_length": require(config, "max_position_embeddings"),
        "tied": config.get("tie_word_embeddings", False),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def to_huggingface(config: DecoderConfig) -> dict:
    """The dictionary of a config.json that `transformers` opens as LlamaForCausalLM.

    ConfigError naming the part when the config has one that LlamaForCausalLM does not.
    """
    block = config.stacks[0].pattern[0]
    if block.attention.bias != block.attention.out_bias:
        raise ConfigError("LlamaForCausalLM has biases on all of q, k, v and o, or on none")
    described = {
        **sizes_of(config, ARCHITECTURES[0]),
        "model_type": "llama",
        "attention_bias": block.attention.bias,
        "mlp_bias": block.ffn.bias,
    }
    require_same(config, from_huggingface(described), ARCHITECTURES[0])
    return described


def sizes_of(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """The inverse of `sizes_from`."""
    block = config.stacks[0].pattern[0]
    if not isinstance(config.position, Rope) or config.position.interleaved:
        raise ConfigError(f"{architecture} needs half-split Rope, not {config.position}")
    return {
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": block.attention.heads,
        "num_key_value_heads": block.attention.kv_heads,
        "head_dim": block.attention.head_size,
        "intermediate_size": block.ffn.features,
        "hidden_act": "silu",
        "rms_norm_eps": block.norm.eps,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.head is None,
        "attention_dropout": block.attention.dropout,
        "rope_parameters": rope_parameters(config.position),
    }
