"""GPT-1, GPT-2 and GPT-3: LayerNorm, learned positions, tanh-GELU, biases everywhere, a tied head.

Radford et al. 2018 (GPT-1), Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3,
arXiv:2005.14165). What changes between generations:

    GPT-1  norm after each residual sum and none at the end; 512 tokens
    GPT-2  norm before each sublayer and one at the end; 1024 tokens; the projections that end in
           the residual stream begin with std 0.02 / sqrt(2L)
    GPT-3  2048 tokens; every other layer sees a band of keys only, in the manner of the Sparse
           Transformer (Child et al. 2019, arXiv:1904.10509)

Differs from what was published:
1. The width of GPT-3's band was not. `band` is 256, as in the replication GPT-Neo, and the first
   layer is dense.
2. GPT-3's sizes are those printed in Table 2.1, where width is not heads * head size for 1.3B
   (24 * 128 for 2048) and 13B (40 * 128 for 5140). With 24 heads the former has 1.52e9 parameters.
3. GPT-2's own code began positions with std 0.01; here they have 0.02 like everything, as in
   transformers. `position=Learned(1024, init_std=0.01)` is the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.models.additive import Learned
from research.models.attention import Attention, even_head_size
from research.models.block import Block, Residual, post_norm, pre_norm
from research.models.decoder import DecoderConfig
from research.models.families.checkpoint import (
    ConfigError,
    Entry,
    packed,
    placed,
    refuse,
    require,
    require_same,
)
from research.models.init import Normal, Rules
from research.models.layers import LayerNorm, Linear, Mlp
from research.models.stack import layers_of, stacks_of

GPT1, GPT2 = ARCHITECTURES = ("OpenAIGPTLMHeadModel", "GPT2LMHeadModel")
MODEL_TYPES = {GPT1: "openai-gpt", GPT2: "gpt2"}
TANH_GELU = {GPT1: ("gelu",), GPT2: ("gelu_new", "gelu_pytorch_tanh")}


def gpt(
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    max_length: int,
    *,
    residual: Residual = pre_norm,
    head_size: int | None = None,
    ffn: int | None = None,
    eps: float = 1e-5,
    windows: Sequence[int | None] | None = None,
    tied: bool = True,
    init_std: float = 0.02,
    dropout: float = 0.1,
    residual_dropout: float = 0.1,
    attention_dropout: float = 0.1,
    **parts: Any,
) -> DecoderConfig:
    """A GPT of any size; `parts` are further DecoderConfig fields (dtype, attend, remat, ...).

    There is a final norm exactly when `residual` is pre_norm. windows: keys that each layer sees.
    ValueError when `heads` do not divide `width` and there is no `head_size`.
    """
    windows = [None] * layers if windows is None else windows
    if len(windows) != layers:
        raise ValueError(f"expected one window for each of {layers} layers, got {windows}")
    attention = Attention(
        heads,
        heads,
        head_size or even_head_size(width, heads),
        bias=True,
        out_bias=True,
        dropout=attention_dropout,
    )
    block = Block(attention, Mlp(ffn or 4 * width), LayerNorm(eps), residual, residual_dropout)
    blocks = [block.clone(attention=attention.clone(window=window)) for window in windows]
    whole = {
        "vocab_size": vocab_size,
        "width": width,
        "stacks": stacks_of(blocks),
        "max_length": max_length,
        "position": Learned(max_length, init_std),
        "final_norm": LayerNorm(eps) if residual is pre_norm else None,
        "head": None if tied else Linear(vocab_size, ("embed", "vocab")),
        "init_std": init_std,
        "init_rules": init_rules(layers if residual is pre_norm else None, init_std),
        "dropout": dropout,
    }
    return DecoderConfig(**{**whole, **parts})


def init_rules(layers: int | None, std: float = 0.02) -> Rules:
    """N(0, std²), for what ends in the residual stream of `layers` layers std / sqrt(2L) (GPT-2)."""
    rules = ((r"stack_.*/kernel", Normal(std)),)
    if layers is None:
        return rules
    return ((r".*/(attention/o|ffn/down)/kernel", Normal(std / (2 * layers) ** 0.5)), *rules)


def gpt3(
    layers: int, width: int, heads: int, head_size: int, band: int = 256, **more: Any
) -> DecoderConfig:
    """A GPT-3: layers 0, 2, ... see everything, layers 1, 3, ... the last `band` keys."""
    windows = [band if layer % 2 else None for layer in range(layers)]
    given = {"vocab_size": 50_257, "max_length": 2048, "head_size": head_size, **more}
    return gpt(layers=layers, width=width, heads=heads, windows=windows, **given)


PRESETS: dict[str, DecoderConfig] = {
    "gpt-1": gpt(40_478, 12, 768, 12, 512, residual=post_norm),
    "gpt-2": gpt(50_257, 12, 768, 12, 1024),
    "gpt-2-medium": gpt(50_257, 24, 1024, 16, 1024),
    "gpt-2-large": gpt(50_257, 36, 1280, 20, 1024),
    "gpt-2-xl": gpt(50_257, 48, 1600, 25, 1024),
    "gpt-3-125m": gpt3(12, 768, 12, 64),
    "gpt-3-350m": gpt3(24, 1024, 16, 64),
    "gpt-3-760m": gpt3(24, 1536, 16, 96),
    "gpt-3-1.3b": gpt3(24, 2048, 24, 128),
    "gpt-3-2.7b": gpt3(32, 2560, 32, 80),
    "gpt-3-6.7b": gpt3(32, 4096, 32, 128),
    "gpt-3-13b": gpt3(40, 5140, 40, 128),
    "gpt-3-175b": gpt3(96, 12_288, 96, 128),
}


def name_map(config: DecoderConfig) -> list[Entry]:
    """Our leaves and transformers' names: GPT-1's when there is no final norm, else GPT-2's."""
    names = ("wte", "wpe") if config.final_norm else ("tokens_embed", "positions_embed")
    trunk = [
        Entry("embed/table", f"{names[0]}.weight"),
        Entry("position/table", f"{names[1]}.weight"),
    ]
    if config.final_norm:
        trunk += norm_names("final_norm", "ln_f")
    entries = [dataclasses.replace(entry, name=f"transformer.{entry.name}") for entry in trunk]
    for path, first, step, block in layers_of(config.stacks):
        entries += placed(block_names(block), path, "transformer.h.{layer}", first, step)
    if config.head is not None:
        entries.append(Entry("head/kernel", "lm_head.weight", transpose=True))
    return entries


def norm_names(ours: str, theirs: str) -> list[Entry]:
    pairs = (("scale", "weight"), ("bias", "bias"))
    return [Entry(f"{ours}/{one}", f"{theirs}.{other}") for one, other in pairs]


def block_names(block: Block) -> list[Entry]:
    """Matrices lie [in, out] in these checkpoints; c_attn holds q, k and v side by side."""
    size = block.attention.heads * block.attention.head_size
    entries = norm_names("attention_norm", "ln_1") + norm_names("ffn_norm", "ln_2")
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        entries += packed(f"attn.c_attn.{theirs}", {f"attention/{x}/{ours}": size for x in "qkv"})
        entries += [
            Entry(f"attention/o/{ours}", f"attn.c_proj.{theirs}"),
            Entry(f"ffn/up/{ours}", f"mlp.c_fc.{theirs}"),
            Entry(f"ffn/down/{ours}", f"mlp.c_proj.{theirs}"),
        ]
    return entries


def from_huggingface(config: dict) -> DecoderConfig:
    """config.json's dictionary -> DecoderConfig. ConfigError for what would change the result."""
    architecture = GPT1 if GPT1 in require(config, "architectures") else GPT2
    width, heads = require(config, "n_embd"), require(config, "n_head")
    if width % heads:
        raise ConfigError(f"config.json: n_head = {heads} does not divide n_embd = {width}")
    if architecture == GPT1:
        refuse(config, "afn", *TANH_GELU[GPT1])
        refuse(config, "n_inner", None, 4 * width)
    else:
        refuse(config, "activation_function", *TANH_GELU[GPT2])
        refuse(config, "scale_attn_weights", True)
        for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            refuse(config, name, False)
        refuse(config, "add_cross_attention", False)
    return gpt(
        require(config, "vocab_size"),
        require(config, "n_layer"),
        width,
        heads,
        require(config, "n_positions"),
        residual=post_norm if architecture == GPT1 else pre_norm,
        ffn=config.get("n_inner"),
        eps=config.get("layer_norm_epsilon", 1e-5),
        tied=config.get("tie_word_embeddings", True),
        init_std=config.get("initializer_range", 0.02),
        dropout=config.get("embd_pdrop", 0.1),
        residual_dropout=config.get("resid_pdrop", 0.1),
        attention_dropout=config.get("attn_pdrop", 0.1),
    )


def to_huggingface(config: DecoderConfig) -> dict:
    """The dictionary of a config.json that `transformers` opens: GPT-1 without a final norm.

    ConfigError naming the part when the config has one that the architecture does not.
    """
    block = config.stacks[0].pattern[0]
    architecture = GPT2 if config.final_norm else GPT1
    described = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": block.attention.heads,
        "layer_norm_epsilon": block.norm.eps,
        "initializer_range": config.init_std,
        "embd_pdrop": config.dropout,
        "resid_pdrop": block.dropout,
        "attn_pdrop": block.attention.dropout,
        "tie_word_embeddings": config.head is None,
    }
    if architecture == GPT1:
        described["afn"] = "gelu"
    else:
        ffn = block.ffn.features
        described |= {
            "activation_function": "gelu_new",
            "n_inner": None if ffn == 4 * config.width else ffn,
        }
    require_same(config, from_huggingface(described), architecture)
    return described
