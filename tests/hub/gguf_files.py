"""Small GGUF files, written as llama.cpp's converter writes them."""

import json

import gguf
from safetensors.numpy import load_file

from research.hub.gguf import LAYER_NAMES, NAMES

TOKENS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "he", "Ġt", "Ġthe", "<|end|>", "<|user|>"]
THEIRS = {theirs: ours for ours, theirs in {**NAMES, **LAYER_NAMES}.items()}


def permute(rows, heads):
    """As llama.cpp's converter does, from halves to pairs."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name):
    if not name.startswith("model.layers."):
        stem, _, kind = name.rpartition(".")
        return f"{THEIRS[stem]}.{kind}"
    _, _, layer, rest = name.split(".", 3)
    stem, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{THEIRS[stem]}.{kind}"


def write(path, tensors, architecture="llama", drop=(), **metadata):
    """A GGUF file of {name: array or (bytes, type)} with metadata over small defaults."""
    fields = {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 24,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * 30 + [3, 4],
        "tokenizer.ggml.merges": ["h e", "Ġ t", "Ġt he"],
        "tokenizer.ggml.eos_token_id": 30,
        **metadata,
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = {str: "string", int: "uint32", float: "float32", list: "array", bool: "bool"}
        if key not in drop:
            getattr(writer, f"add_{add[type(value)]}")(key, value)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(case):
    """The tensors of a tiny llama directory as the converter writes them."""
    tensors = {}
    for name, array in load_file(case / "model.safetensors").items():
        heads = 8 if ".q_proj." in name else 2 if ".k_proj." in name else None
        tensors[gguf_name(name)] = array if heads is None else permute(array, heads)
    return tensors


def metadata_for(case):
    config = json.loads((case / "config.json").read_text())
    return {
        "llama.attention.key_length": config["head_dim"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
    }
