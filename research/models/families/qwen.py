"""Qwen1.5, Qwen2 and Qwen2.5: LLaMA with biases on q, k and v, and on nothing else.

Bai et al. 2023 (arXiv:2309.16609), Qwen2 (arXiv:2407.10671), Qwen2.5 (arXiv:2412.15115); in
transformers all are Qwen2ForCausalLM. What changes between generations:

    Qwen1.5  multi-head attention but for 32B and 110B (8 key/value heads), 32,768 tokens
    Qwen2    grouped-query attention in all sizes, 131,072 tokens (32,768 trained on); 1.5B and
             below have tied embeddings
    Qwen2.5  new sizes; 3B and below have tied embeddings and, 1.5B apart, 32,768 tokens

Presets are the base models. Of one size a base model and its instruction-tuned form may differ in
eps, theta and context (Qwen2.5-14B: eps 1e-5 and 131,072 tokens, or 1e-6 and 32,768), so a
checkpoint is always read by its own config. Sliding windows are off in all of them; a config that
turns them on gives stacks of layers that slide and layers that do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.models.decoder import DecoderConfig
from research.models.families import llama
from research.models.families.checkpoint import ConfigError, require_same
from research.models.position import Rope
from research.models.stack import stacks_of

ARCHITECTURES = ("Qwen2ForCausalLM",)
FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
name_map = llama.name_map


def qwen(*sizes: int, windows: Sequence[int | None] | None = None, **more: Any) -> DecoderConfig:
    """A Qwen of any size, with the arguments of `llama`; `windows`: keys that each layer sees."""
    given = {"eps": 1e-6, "position": Rope(1e6), "max_length": 32_768, **more}
    config = llama.llama(*sizes, attention_bias=True, out_bias=False, **given)
    if windows is None:
        return config
    if len(windows) != config.layers:
        raise ValueError(f"expected one window for each of {config.layers} layers, got {windows}")
    (block,) = config.stacks[0].pattern
    blocks = [block.clone(attention=block.attention.clone(window=window)) for window in windows]
    return dataclasses.replace(config, stacks=stacks_of(blocks))


SMALL, LARGE, LONG = 151_936, 152_064, 131_072  # vocabularies, and a context

PRESETS: dict[str, DecoderConfig] = {
    "qwen1.5-0.5b": qwen(SMALL, 24, 1024, 16, 16, 2816, tied=True),
    "qwen1.5-1.8b": qwen(SMALL, 24, 2048, 16, 16, 5504),
    "qwen1.5-4b": qwen(SMALL, 40, 2560, 20, 20, 6912, position=Rope(5e6)),
    "qwen1.5-7b": qwen(SMALL, 32, 4096, 32, 32, 11_008),
    "qwen1.5-14b": qwen(LARGE, 40, 5120, 40, 40, 13_696),
    "qwen1.5-32b": qwen(LARGE, 64, 5120, 40, 8, 27_392),
    "qwen1.5-72b": qwen(LARGE, 80, 8192, 64, 64, 24_576),
    "qwen1.5-110b": qwen(LARGE, 80, 8192, 64, 8, 49_152),
    "qwen2-0.5b": qwen(SMALL, 24, 896, 14, 2, 4864, tied=True, max_length=LONG),
    "qwen2-1.5b": qwen(SMALL, 28, 1536, 12, 2, 8960, tied=True, max_length=LONG),
    "qwen2-7b": qwen(LARGE, 28, 3584, 28, 4, 18_944, max_length=LONG),
    "qwen2-72b": qwen(LARGE, 80, 8192, 64, 8, 29_568, max_length=LONG, eps=1e-5),
    "qwen2.5-0.5b": qwen(SMALL, 24, 896, 14, 2, 4864, tied=True),
    "qwen2.5-1.5b": qwen(SMALL, 28, 1536, 12, 2, 8960, tied=True, max_length=LONG),
    "qwen2.5-3b": qwen(SMALL, 36, 2048, 16, 2, 11_008, tied=True),
    "qwen2.5-7b": qwen(LARGE, 28, 3584, 28, 4, 18_944, max_length=LONG),
    "qwen2.5-14b": qwen(LARGE, 48, 5120, 40, 8, 13_824, max_length=LONG, eps=1e-5),
    "qwen2.5-32b": qwen(LARGE, 64, 5120, 40, 8, 27_648, max_length=LONG, eps=1e-5),
    "qwen2.5-72b": qwen(LARGE, 80, 8192, 64, 8, 29_568, max_length=LONG, eps=1e-5),
}


def from_huggingface(config: dict) -> DecoderConfig:
    """config.json's dictionary -> DecoderConfig. ConfigError for what would change the result."""
    given = llama.sizes_from(config)
    sizes = [given.pop(n) for n in ("vocab_size", "layers", "width", "heads", "kv_heads", "ffn")]
    return qwen(*sizes, windows=windows_from(config, sizes[1]), **given)


def windows_from(config: dict, layers: int) -> list[int | None]:
    """Keys that each layer sees: `sliding_window` of them where its type says so, else all.

    Without `layer_types` (transformers before 5) the layers from `max_window_layers` on slide.
    """
    window, first = config.get("sliding_window", 4096), config.get("max_window_layers", 28)
    if not config.get("use_sliding_window"):
        window, first = None, layers
    types = config.get("layer_types") or [
        SLIDING if layer >= first else FULL for layer in range(layers)
    ]
    if len(types) != layers or not set(types) <= set(LAYER_TYPES):
        raise ConfigError(
            f"config.json: layer_types = {types}; expected {layers} of {' or '.join(LAYER_TYPES)}"
        )
    if SLIDING in types and window is None:
        raise ConfigError(
            "config.json: layer_types has sliding_attention, but sliding_window or "
            "use_sliding_window says that nothing slides"
        )
    return [window if kind == SLIDING else None for kind in types]


def to_huggingface(config: DecoderConfig) -> dict:
    """The dictionary of a config.json that `transformers` opens as Qwen2ForCausalLM.

    ConfigError naming the part when the config has one that Qwen2ForCausalLM does not.
    """
    blocks = [block for stack in config.stacks for block in stack.pattern * stack.count]
    windows = [block.attention.window for block in blocks]
    described = {
        **llama.sizes_of(config, ARCHITECTURES[0]),
        "model_type": "qwen2",
        "use_sliding_window": any(windows),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }
    if any(windows):
        slides = [window is not None for window in windows]
        described["sliding_window"] = next(window for window in windows if window is not None)
        if slides == sorted(slides):  # as readers know it that have no layer_types
            described["max_window_layers"] = slides.index(True)
    require_same(config, from_huggingface(described), ARCHITECTURES[0])
    return described
