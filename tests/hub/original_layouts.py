"""Model directories as the original code of ChatGLM and Baichuan lays them out, written by hand.

Names and packing are spelt out here, from the modules of that code, and share nothing with the
name maps they are read by.
"""

import json

import numpy as np
from safetensors.numpy import load_file, save_file


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def chatglm2(folder, case):
    """A directory of GlmForCausalLM, `case`, as ChatGLM2's code would have it."""
    old = load_file(case / "model.safetensors")
    given = json.loads((case / "config.json").read_text())
    new = {
        "transformer.embedding.word_embeddings.weight": old["model.embed_tokens.weight"],
        "transformer.rotary_pos_emb.inv_freq": np.ones(2, np.float32),
        "transformer.encoder.final_layernorm.weight": old["model.norm.weight"],
        "transformer.output_layer.weight": old["lm_head.weight"],
    }
    for n in range(given["num_hidden_layers"]):
        a, b = f"model.layers.{n}.", f"transformer.encoder.layers.{n}."
        for kind in ("weight", "bias"):
            parts = [old[f"{a}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            new[f"{b}self_attention.query_key_value.{kind}"] = np.concatenate(parts)
        new[f"{b}self_attention.dense.weight"] = old[f"{a}self_attn.o_proj.weight"]
        new[f"{b}mlp.dense_h_to_4h.weight"] = old[f"{a}mlp.gate_up_proj.weight"]
        new[f"{b}mlp.dense_4h_to_h.weight"] = old[f"{a}mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            new[f"{b}{norm}.weight"] = old[f"{a}{norm}.weight"]
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "ffn_hidden_size": given["intermediate_size"],
        "hidden_size": given["hidden_size"],
        "kv_channels": given["head_dim"],
        "layernorm_epsilon": given["rms_norm_eps"],
        "multi_query_attention": True,
        "multi_query_group_num": given["num_key_value_heads"],
        "num_attention_heads": given["num_attention_heads"],
        "num_layers": given["num_hidden_layers"],
        "original_rope": True,
        "padded_vocab_size": given["vocab_size"],
        "post_layer_norm": True,
        "pre_seq_len": None,
        "quantization_bit": 0,
        "rmsnorm": True,
        "seq_length": given["max_position_embeddings"],
        "tie_word_embeddings": False,
    }
    return write(folder, config, new)


def baichuan(folder, file, **fields):
    """The LLaMA weights of a tiny_baichuan file as Baichuan's code would have them."""
    found = load_file(file)
    old = {n.removeprefix("weight."): a for n, a in found.items() if n.startswith("weight.")}
    new = baichuan_names(old)
    new["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    config = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "hidden_act": "silu",
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "vocab_size": 64,
        **fields,
    }
    return write(folder, config, new)


def baichuan_names(old):
    """Tensors in LLaMA's names with q, k and v of every layer put into one."""
    new = {name: array for name, array in old.items() if name.split(".")[-2][1:] != "_proj"}
    new |= {name: array for name, array in old.items() if ".o_proj." in name}
    for n in range(2):
        at = f"model.layers.{n}.self_attn."
        new[f"{at}W_pack.weight"] = np.concatenate([old[f"{at}{x}_proj.weight"] for x in "qkv"])
    return new
