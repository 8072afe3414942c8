"""GGUF files of the qwen2 architecture: names, biases, rows that stay where they are, tokenizer."""

import json

import jax
import numpy as np
import pytest
from gguf_files import gguf_name, write
from hub_reference import FIXTURES
from safetensors.numpy import load_file

from research import hub
from research.hub import CheckpointError

CASE = FIXTURES / "tiny_qwen" / "tied"
DIGITS = {
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [*"0123456789", "12", *"Ã©", "Ã©", "<|endoftext|>", "<|im_end|>"],
    "tokenizer.ggml.token_type": [1] * 14 + [3, 3],
    "tokenizer.ggml.merges": ["1 2", "Ã ©"],
    "tokenizer.ggml.eos_token_id": 15,
    "tokenizer.ggml.padding_token_id": 14,
    "tokenizer.ggml.add_bos_token": False,
}


def qwen2(path, tensors, **more):
    """A qwen2 file of `tensors` with the sizes of CASE."""
    config = json.loads((CASE / "config.json").read_text())
    metadata = {
        "qwen2.block_count": config["num_hidden_layers"],
        "qwen2.context_length": config["max_position_embeddings"],
        "qwen2.embedding_length": config["hidden_size"],
        "qwen2.feed_forward_length": config["intermediate_size"],
        "qwen2.attention.head_count": config["num_attention_heads"],
        "qwen2.attention.head_count_kv": config["num_key_value_heads"],
        "qwen2.attention.key_length": config["head_dim"],
        "qwen2.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen2.rope.freq_base": config["rope_parameters"]["rope_theta"],
    }
    return write(path, tensors, architecture="qwen2", **metadata | DIGITS | more)


@pytest.fixture
def tensors():
    stored = load_file(CASE / "model.safetensors")
    return {gguf_name(name): array for name, array in stored.items()}


def test_equal_to_the_directory_it_was_converted_from(tmp_path, tensors):
    ours, theirs = hub.load(qwen2(tmp_path / "model.gguf", tensors)), hub.load(CASE)
    assert ours.model.config == theirs.model.config
    assert ours.params["stack_0"]["block_0"]["attention"]["q"]["bias"].any()
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    ids = [1, 5, 9, 3]
    np.testing.assert_array_equal(ours.logits(ids), theirs.logits(ids))


def test_saved_as_a_directory_and_read_again(tmp_path, tensors):
    loaded = hub.load(qwen2(tmp_path / "model.gguf", tensors))
    hub.save(tmp_path / "out", loaded)
    again = hub.load(tmp_path / "out")
    assert again.model.config == loaded.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    assert again.tokenizer.encode("12<|im_end|>") == loaded.tokenizer.encode("12<|im_end|>")


def test_its_tokenizer_splits_digits_composes_letters_and_adds_no_bos(tmp_path, tensors):
    tokenizer = hub.load(qwen2(tmp_path / "model.gguf", tensors)).tokenizer
    assert tokenizer.encode("121", add_special=True) == [1, 2, 1]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é") == [13]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (15, 14, None)


def test_a_missing_bias_and_a_sliding_window_are_refused(tmp_path, tensors):
    path = qwen2(tmp_path / "a.gguf", tensors, **{"qwen2.attention.sliding_window": 4})
    with pytest.raises(CheckpointError, match=r"qwen2.attention.sliding_window = 4 is not supp"):
        hub.load(path)
    del tensors["blk.1.attn_q.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*layers.1.self_attn.q_proj.bias"):
        hub.load(qwen2(tmp_path / "b.gguf", tensors))
