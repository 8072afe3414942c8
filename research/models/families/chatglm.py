"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B in the layouts of their original code; GLM-130B's config.

Du et al. 2022, GLM (arXiv:2103.10360); Zeng et al. 2022, GLM-130B (arXiv:2210.02414); GLM Team 2024
(arXiv:2406.12793).

ChatGLM-6B: LayerNorm; the residual stream carries the normalised tensor times (2L)^(1/2)
(`NormedResidual`, which is DeepNorm); GELU (tanh), 4d, not gated; biases everywhere; two-dimensional
RoPE and a bidirectional context, both read in the tokens (`prefix`); tied head. Its queries are
divided by layer + 1 and its scores multiplied by it again, which is rounding in float16 and nothing
here. The original's cos and sin are float16 too, ours float32, which is a difference of 4e-5 in the
output of a tiny network.

ChatGLM2 and ChatGLM3 compute what `glm` does; 2 and 3 differ in their context and their prompts.

GLM-130B was never published in one of these layouts: its config (post-norm by DeepNorm in the form
of ChatGLM-6B, one-dimensional RoPE, GeGLU, vocabulary padded to 150,528) is derived from the paper.

All say `"model_type": "chatglm"`; ChatGLM-6B is the one with `inner_hidden_size`, the later ones
have `padded_vocab_size`.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from research.models.attention import Attention, even_head_size
from research.models.block import Block, NormedResidual
from research.models.decoder import DecoderConfig
from research.models.families import glm
from research.models.families.checkpoint import (
    ConfigError,
    Entry,
    packed,
    placed,
    refuse,
    require,
    require_same,
)
from research.models.layers import GatedMlp, LayerNorm, Mlp
from research.models.position import NoPosition, Rope
from research.models.prefix import PrefixRope2d
from research.models.stack import Stack, layers_of

ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
GLM4_VOCABULARY = 151_552


def chatglm(
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    ffn: nn.Module,
    *,
    eps: float = 1e-5,
    position: NoPosition = PrefixRope2d(),
    max_length: int = 2048,
    **parts: Any,
) -> DecoderConfig:
    """A first-generation ChatGLM of any size; `parts` are further DecoderConfig fields.

    ValueError when `heads` do not divide `width`.
    """
    attention = Attention(heads, heads, even_head_size(width, heads), bias=True, out_bias=True)
    block = Block(attention, ffn, LayerNorm(eps), NormedResidual((2 * layers) ** 0.5))
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        stacks=(Stack(layers, (block,)),),
        max_length=max_length,
        position=position,
        final_norm=LayerNorm(eps),
        **parts,
    )


_GEGLU = GatedMlp(32_768, activation=nn.gelu, bias=True)

PRESETS: dict[str, DecoderConfig] = {
    "glm-130b": chatglm(150_528, 70, 12_288, 96, _GEGLU, position=Rope()),
    "chatglm-6b": chatglm(130_528, 28, 4096, 32, Mlp(16_384)),
    "chatglm2-6b": glm.glm(65_024, 28, 4096, 32, 2, 13_696, max_length=32_768),
    "chatglm3-6b": glm.glm(65_024, 28, 4096, 32, 2, 13_696, max_length=8192),
}


def name_map(config: DecoderConfig) -> list[Entry]:
    """Our leaves and the names of the original code."""
    if isinstance(config.position, PrefixRope2d):
        embedding, layers = "transformer.word_embeddings", "transformer.layers.{layer}"
        final, names = "transformer.final_layernorm", _first_block
    else:
        embedding, layers = (
            "transformer.embedding.word_embeddings",
            "transformer.encoder.layers.{layer}",
        )
        final, names = "transformer.encoder.final_layernorm", _second_block
    entries = [Entry("embed/table", f"{embedding}.weight")]
    entries += _norm("final_norm", final, config.final_norm)
    for path, first, step, block in layers_of(config.stacks):
        entries += placed(names(block), path, layers, first, step)
    if config.head is not None:
        entries.append(Entry("head/kernel", "transformer.output_layer.weight", transpose=True))
    return entries


def _norm(ours: str, theirs: str, norm: nn.Module) -> list[Entry]:
    bias = [Entry(f"{ours}/bias", f"{theirs}.bias")] if isinstance(norm, LayerNorm) else []
    return [Entry(f"{ours}/scale", f"{theirs}.weight"), *bias]


def _linear(ours: str, theirs: str, bias: bool) -> list[Entry]:
    biases = [Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else []
    return [Entry(f"{ours}/kernel", f"{theirs}.weight", transpose=True), *biases]


def _qkv(theirs: str, widths: dict[str, int], bias: bool) -> list[Entry]:
    kernels = {f"attention/{name}/kernel": width for name, width in widths.items()}
    biases = {f"attention/{name}/bias": width for name, width in widths.items()}
    entries = packed(f"{theirs}.query_key_value.weight", kernels, transpose=True)
    return entries + (packed(f"{theirs}.query_key_value.bias", biases) if bias else [])


def _norms(block: Block) -> list[Entry]:
    return [
        *_norm("attention_norm", "input_layernorm", block.norm),
        *_norm("ffn_norm", "post_attention_layernorm", block.norm),
    ]


def _first_block(block: Block) -> list[Entry]:
    """ChatGLM-6B: q, k and v of one head, then those of the next."""
    size = block.attention.head_size
    return [
        *_norms(block),
        *_qkv("attention", {"q": size, "k": size, "v": size}, bias=True),
        *_linear("attention/o", "attention.dense", bias=True),
        *_linear("ffn/up", "mlp.dense_h_to_4h", bias=True),
        *_linear("ffn/down", "mlp.dense_4h_to_h", bias=True),
    ]


def _second_block(block: Block) -> list[Entry]:
    """ChatGLM2 and 3: all queries, all keys, all values; gate, then up."""
    attention = block.attention
    keys = attention.kv_heads * attention.head_size
    widths = {"q": attention.heads * attention.head_size, "k": keys, "v": keys}
    halves = dict.fromkeys(("ffn/gate/kernel", "ffn/up/kernel"), block.ffn.features)
    return [
        *_norms(block),
        *_qkv("self_attention", widths, attention.bias),
        *_linear("attention/o", "self_attention.dense", bias=False),
        *packed("mlp.dense_h_to_4h.weight", halves, transpose=True),
        *_linear("ffn/down", "mlp.dense_4h_to_h", bias=False),
    ]


def from_huggingface(config: dict) -> DecoderConfig:
    """config.json's dictionary -> DecoderConfig. ConfigError for what would change the result."""
    refuse(config, "quantization_bit", 0, None)  # packed integers
    refuse(config, "pre_seq_len", None)  # P-tuning's trained prefix
    generations = [name for name in ("inner_hidden_size", "padded_vocab_size") if name in config]
    if len(generations) != 1:
        raise ConfigError(
            "config.json: a ChatGLM-6B has inner_hidden_size, a ChatGLM2 or 3 padded_vocab_size; "
            f"this one has {' and '.join(generations) or 'neither'}"
        )
    return _first_from(config) if generations == ["inner_hidden_size"] else _second_from(config)


def _first_from(config: dict) -> DecoderConfig:
    """ChatGLM-6B's."""
    require(config, "position_encoding_2d")
    refuse(config, "position_encoding_2d", True)
    refuse(config, "tie_word_embeddings", True)
    start, gmask, mask = (require(config, f"{name}_token_id") for name in ("bos", "gmask", "mask"))
    return chatglm(
        require(config, "vocab_size"),
        require(config, "num_layers"),
        require(config, "hidden_size"),
        require(config, "num_attention_heads"),
        Mlp(require(config, "inner_hidden_size")),
        eps=require(config, "layernorm_epsilon"),
        position=PrefixRope2d(start_id=start, mask_ids=(gmask, mask)),
        max_length=require(config, "max_sequence_length"),
    )


# What the code of ChatGLM2 and 3 can be told to do otherwise, and what all published ones say.
SECOND = {
    "rmsnorm": True,
    "multi_query_attention": True,
    "post_layer_norm": True,
    "original_rope": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
}


def _second_from(config: dict) -> DecoderConfig:
    """ChatGLM2's, ChatGLM3's and GLM-4's."""
    for name, value in SECOND.items():
        refuse(config, name, value)
    require(config, "multi_query_attention")  # without it the code's default is False
    vocab_size, layers = require(config, "padded_vocab_size"), require(config, "num_layers")
    refuse(config, "vocab_size", vocab_size)  # both are said twice where the original code saved
    refuse(config, "num_hidden_layers", layers)
    ratio = config.get("rope_ratio", 1)
    if ratio != 1 and vocab_size != GLM4_VOCABULARY:
        raise ConfigError(
            f"config.json: rope_ratio = {ratio} divides positions in ChatGLM2's code and multiplies "
            "theta in ChatGLM3's, and nothing here says which one it is: not implemented"
        )
    return glm.glm(
        vocab_size,
        layers,
        require(config, "hidden_size"),
        require(config, "num_attention_heads"),
        require(config, "multi_query_group_num"),
        require(config, "ffn_hidden_size"),
        head_size=require(config, "kv_channels"),
        eps=require(config, "layernorm_epsilon"),
        max_length=require(config, "seq_length"),
        bias=require(config, "add_qkv_bias"),
        theta=1e4 * ratio,
    )


def to_huggingface(config: DecoderConfig) -> dict:
    """The dictionary of a config.json for the original code; ConfigError for what it cannot do."""
    first = isinstance(config.position, PrefixRope2d)
    if not first and not isinstance(config.position, Rope):
        raise ConfigError(f"ChatGLM has PrefixRope2d or Rope, not {config.position}")
    if first and not isinstance(config.stacks[0].pattern[0].ffn, Mlp):
        raise ConfigError(f"ChatGLM-6B's feed-forward is an Mlp, not gated: {config.stacks}")
    if not first and config.head is None:
        raise ConfigError("no layout of this code has RoPE and a tied head (GLM-130B has none)")
    block = config.stacks[0].pattern[0]
    described = {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "chatglm",
        "hidden_size": config.width,
        "num_layers": config.layers,
        "num_attention_heads": block.attention.heads,
        "layernorm_epsilon": block.norm.eps,
        **(_first_fields(config, block) if first else _second_fields(config, block)),
    }
    require_same(config, from_huggingface(described), ARCHITECTURES[0])
    return described


def _first_fields(config: DecoderConfig, block: Block) -> dict:
    gmask, mask = config.position.mask_ids
    return {
        "vocab_size": config.vocab_size,
        "inner_hidden_size": block.ffn.features,
        "max_sequence_length": config.max_length,
        "position_encoding_2d": True,
        "bos_token_id": config.position.start_id,
        "gmask_token_id": gmask,
        "mask_token_id": mask,
    }


def _second_fields(config: DecoderConfig, block: Block) -> dict:
    ratio = config.position.theta / 1e4
    return {
        **SECOND,
        "padded_vocab_size": config.vocab_size,
        "ffn_hidden_size": block.ffn.features,
        "kv_channels": block.attention.head_size,
        "multi_query_group_num": block.attention.kv_heads,
        "seq_length": config.max_length,
        "add_qkv_bias": block.attention.bias,
        **({} if ratio == 1 else {"rope_ratio": ratio}),
    }
