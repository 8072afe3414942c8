"""GGUF files of the architectures llama and qwen2, read as Hugging Face checkpoints.

GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is the single-file format of
llama.cpp: typed metadata, then tensors that may be quantized. Here the metadata is translated into
a config.json dictionary, tensors are renamed and dequantized one at a time from a memory map, and
in a llama the rows of attn_q and attn_k are put back into half-split order: llama.cpp's converter
interleaves the two halves of each head, since it turns neighbouring pairs of features there. Left
as they are, the model runs and is merely worse. In a qwen2 it turns halves, and nothing is moved.
Some types can be kept in their own blocks instead (`quantized_gguf`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from research.hub import quantized_gguf
from research.hub.checkpoint import Checkpoint, CheckpointError
from research.models.position import Llama3
from research.weights.quantized import Quantized

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
MAGIC = b"GGUF"

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # not a parameter: how Llama 3.1's scaling is written down

Metadata = Callable[..., Any]  # (key) -> value, or (key, default)


def open_gguf(path: str | Path, blocks: bool = False) -> tuple[Checkpoint, Metadata]:
    """The checkpoint in a file, and its metadata by key. With `blocks` it says what can stay so.

    Raises CheckpointError when the file is missing, truncated, not GGUF, of another architecture,
    or holds a tensor that cannot be dequantized or has no place in the model.
    """
    path = Path(path)
    reader = read_header(path)
    metadata = metadata_of(path, reader)
    architecture = metadata("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not supported in GGUF files; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    for field in (f"{architecture}.expert_count", f"{architecture}.attention.sliding_window"):
        if metadata(field, 0):
            raise CheckpointError(f"{path}: {field} = {metadata(field)} is not supported")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop(ROPE_FACTORS, None)
    for tensor in tensors.values():
        require_readable(path, tensor)
    named = {huggingface_name(path, name): tensor for name, tensor in tensors.items()}
    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in named.items()}
    config = config_of(path, metadata, shapes, None if factors is None else dequantize(factors))

    def read(name: str) -> np.ndarray:
        array = dequantize(named[name]).reshape(shapes[name])
        heads = rotated_heads(name, config)
        return array if heads is None else unpermute(array, heads)

    def read_coded(name: str) -> Quantized:
        rows = quantized_gguf.blocks(path, named[name], shapes[name])
        heads = rotated_heads(name, config)
        return rows if heads is None else jax.tree.map(lambda leaf: unpermute(leaf, heads), rows)

    kinds = {name: quantized_gguf.kind(t, shapes[name]) for name, t in named.items() if blocks}
    coded = {name: kind for name, kind in kinds.items() if kind is not None}
    return Checkpoint(path, config, shapes, read, coded, read_coded), metadata


def read_header(path: Path) -> gguf.GGUFReader:
    """The opened file; every tensor lies inside it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        # The reader maps every field and tensor while it opens; one that runs past the end of the
        # file shows as an array of the wrong size.
        raise CheckpointError(
            f"{path}: truncated or damaged: its header promises more than the "
            f"{path.stat().st_size} bytes there are, or is not readable ({error})"
        ) from error


def metadata_of(path: Path, reader: gguf.GGUFReader) -> Metadata:
    """Metadata by key; a key without a default must be there."""

    def get(key: str, *default: Any) -> Any:
        field = reader.get_field(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise CheckpointError(f"{path}: the metadata lacks {key!r}")

    return get


def dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def require_readable(path: Path, tensor: gguf.ReaderTensor) -> None:
    """CheckpointError when the tensor's type has no dequantizer. One block of zeros tells."""
    _, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} has type {tensor.tensor_type.name}, which cannot be "
            "dequantized"
        ) from error


def huggingface_name(path: Path, name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
    stem, _, kind = name.rpartition(".")
    if stem in NAMES and kind == "weight":
        return f"{NAMES[stem]}.{kind}"
    raise CheckpointError(f"{path}: tensor {name!r} has no place in a llama or a qwen2")


def rotated_heads(name: str, config: dict[str, Any]) -> int | None:
    """How many heads the rows of a tensor are divided into, when the converter interleaved them."""
    if config["model_type"] != "llama":
        return None
    if ".self_attn.q_proj." in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if ".self_attn.k_proj." in name else None


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [N*H, ...] of each head from pairs (2i, 2i+1) to halves (i, i + H/2)."""
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def config_of(
    path: Path,
    metadata: Metadata,
    shapes: dict[str, tuple[int, ...]],
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """The config.json dictionary that the metadata and the tensors amount to."""

    kind = metadata("general.architecture")

    def number(key: str, *default: Any) -> Any:
        value = metadata(f"{kind}.{key}", *default)
        if isinstance(value, list):
            raise CheckpointError(f"{path}: {kind}.{key} differs between layers: not supported")
        # float32 on file: its shortest form is the number that was meant (1e-05).
        return float(str(np.float32(value))) if isinstance(value, float) else value

    width, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", width // heads)
    rotated = number("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(f"{path}: rotates {rotated} of {head_dim} features: not supported")
    vocab_size = shapes.get("model.embed_tokens.weight", (number("vocab_size", 0),))[0]
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(path, number, head_dim, rope_factors),
        "attention_dropout": 0.0,
        **(biases(shapes) if kind == "llama" else {}),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "bos_token_id": metadata("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": metadata("tokenizer.ggml.eos_token_id", None),
        "pad_token_id": metadata("tokenizer.ggml.padding_token_id", None),
        "dtype": "float32",
    }


def biases(shapes: dict[str, tuple[int, ...]]) -> dict[str, bool]:
    """A llama may have them, which its tensors tell; a qwen2 always has the same."""
    return {
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
    }


def rope_parameters(
    path: Path, number: Metadata, head_dim: int, factors: np.ndarray | None
) -> dict[str, Any]:
    theta = number("rope.freq_base", 10_000.0)
    kind = number("rope.scaling.type", "none")
    if factors is not None:
        return {"rope_theta": theta, **llama3_parameters(path, theta, head_dim, factors)}
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        factor = number("rope.scaling.factor")
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    raise CheckpointError(
        f"{path}: rope scaling {kind!r} is not supported in GGUF files; supported: none, linear, "
        f"and Llama 3.1's ({ROPE_FACTORS})"
    )


def llama3_parameters(
    path: Path, theta: float, head_dim: int, factors: np.ndarray
) -> dict[str, Any]:
    """Llama 3.1's scaling from the divisor [H/2] of each frequency, which is all the file holds."""
    scaling = Llama3(factor=float(factors.max()))
    inverse = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    expected = inverse / scaling.frequencies(inverse, theta)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{path}: {ROPE_FACTORS} is not Llama 3.1's scaling by factor {scaling.factor:g} of an "
            f"original context of {scaling.original_length}: not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
