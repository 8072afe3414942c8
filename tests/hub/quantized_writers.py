"""GPTQ and AWQ directories, written number by number as their libraries lay them out.

GPTQ after the module docs and `pack` of AutoGPTQ 0.7 and of GPTQModel, which go on with its files: a
word takes codes of one output's neighbouring inputs from its lowest bits up; for 3 bits, 32 codes
take three words, the 11th and the 22nd of them lie across two. Zeros are one less than they are, in
version 1, and wrap around. AWQ after AutoAWQ 0.2's WQLinear_GEMM: a word takes eight neighbouring
outputs of one input in the order 0 2 4 6 1 3 5 7. Only shapes and orders are taken from there; the
loops are slow and plain, and share nothing with what reads them.
"""

import json

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "tie_word_embeddings": False,
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def words_of(codes, bits):
    """A list of codes as a list of words of 32 bits."""
    words, codes = [], [int(code) for code in codes]
    if bits != 3:
        for start in range(0, len(codes), 32 // bits):
            run = codes[start : start + 32 // bits]
            words.append(sum(code << bits * i for i, code in enumerate(run)))
        return words
    for start in range(0, len(codes), 32):
        c = codes[start : start + 32]
        words.append(sum(c[i] << 3 * i for i in range(10)) | (c[10] & 3) << 30)
        words.append(
            c[10] >> 2 | sum(c[11 + i] << 3 * i + 1 for i in range(10)) | (c[21] & 1) << 31
        )
        words.append(c[21] >> 1 | sum(c[22 + i] << 3 * i + 2 for i in range(10)))
    return words


def int32(words):
    return np.array(words, np.uint64).astype(np.uint32).view(np.int32)


def gptq_tensors(stem, codes, zeros, scales, index, bits, version=1):
    """codes [in, out], zeros and scales [groups, out], index [in]."""
    less = 1 if version == 1 else 0
    stored = (zeros - less) % 2**bits
    return {
        f"{stem}.qweight": np.ascontiguousarray(int32([words_of(c, bits) for c in codes.T]).T),
        f"{stem}.qzeros": int32([words_of(row, bits) for row in stored]),
        f"{stem}.scales": scales,
        f"{stem}.g_idx": index.astype(np.int32),
    }


def awq_tensors(stem, codes, zeros, scales):
    def packed(rows):
        words = []
        for row in rows:
            eights = [row[i : i + 8] for i in range(0, len(row), 8)]
            words.append([words_of(e[[0, 2, 4, 6, 1, 3, 5, 7]], 4)[0] for e in eights])
        return int32(words)

    return {
        f"{stem}.qweight": packed(codes),
        f"{stem}.qzeros": packed(zeros),
        f"{stem}.scales": scales,
    }


def write(folder, method, bits, group, act_order=False, skip=(), version=1, **said):
    """A LLaMA of random codes; {name: the matrix [out, in] that they mean, or a plain one}."""
    rng = np.random.default_rng(bits)
    tensors, matrices = {}, {}

    def plain(name, shape, spread):
        matrices[name] = tensors[name] = rng.normal(0, spread, shape).astype(np.float32)

    plain("model.embed_tokens.weight", (32, 64), 0.5)
    plain("lm_head.weight", (32, 64), 0.5)
    plain("model.norm.weight", (64,), 0.5)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        plain(f"{prefix}.input_layernorm.weight", (64,), 0.5)
        plain(f"{prefix}.post_attention_layernorm.weight", (64,), 0.5)
        for module, (outs, ins) in SHAPES.items():
            stem, size = f"{prefix}.{module}", ins if group == -1 else group
            if module in skip:
                plain(f"{stem}.weight", (outs, ins), 0.1)
                continue
            codes = rng.integers(0, 2**bits, (ins, outs))
            zeros = rng.integers(0, 2**bits, (ins // size, outs))
            scales = rng.uniform(0.01, 0.1, (ins // size, outs)).astype(np.float16)
            index = np.arange(ins) // size
            if act_order:
                index = rng.permutation(index)
            if method == "gptq":
                tensors |= gptq_tensors(stem, codes, zeros, scales, index, bits, version)
            else:
                tensors |= awq_tensors(stem, codes, zeros, scales)
            matrix = np.empty((outs, ins), np.float32)
            for i in range(ins):
                g = index[i]
                matrix[:, i] = (codes[i] - zeros[g]) * scales[g].astype(np.float32)
            matrices[f"{stem}.weight"] = matrix
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    description = {"quant_method": method, "bits": bits, "group_size": group, **said}
    config = CONFIG | {"quantization_config": description}
    (folder / "config.json").write_text(json.dumps(config))
    return matrices
