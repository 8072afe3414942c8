"""ChatGLM-6B written out in NumPy, in float64, over tensors in the original code's names.

Straight from the formulas of its final release, token by token and head by head; it shares nothing
with the library.
"""

import numpy as np

SIZES = dict(
    vocab_size=40, hidden_size=24, inner_hidden_size=40, num_attention_heads=3, num_layers=2
)
GMASK, MASK, SOP = 31, 30, 34


def config():
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "bos_token_id": SOP,
        "eos_token_id": 35,
        "gmask_token_id": GMASK,
        "mask_token_id": MASK,
        "pad_token_id": 3,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 128,
        "position_encoding_2d": True,
        "pre_seq_len": None,
        "quantization_bit": 0,
        **SIZES,
    }


def random_tensors(seed=0):
    """A checkpoint; the head is written out, as the published one's is."""
    rng = np.random.default_rng(seed)
    D, F = SIZES["hidden_size"], SIZES["inner_hidden_size"]

    def normal(*shape):
        return (0.3 * rng.normal(size=shape)).astype(np.float32)

    tensors = {"transformer.word_embeddings.weight": normal(SIZES["vocab_size"], D)}
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].copy()
    linears = {
        "attention.query_key_value": (3 * D, D),
        "attention.dense": (D, D),
        "mlp.dense_h_to_4h": (F, D),
        "mlp.dense_4h_to_h": (D, F),
    }
    norms = ["transformer.final_layernorm"]
    for n in range(SIZES["num_layers"]):
        at = f"transformer.layers.{n}"
        for name, shape in linears.items():
            tensors[f"{at}.{name}.weight"], tensors[f"{at}.{name}.bias"] = (
                normal(*shape),
                normal(shape[0]),
            )
        norms += [f"{at}.input_layernorm", f"{at}.post_attention_layernorm"]
        tensors[f"{at}.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    for name in norms:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + normal(D), normal(D)
    return tensors


def positions(ids):
    """(first, second, columns open to all) of one row without padding."""
    start = ids.index(SOP)
    pinned = ids.index(GMASK) if GMASK in ids else ids.index(MASK)
    first = [i if i < start else pinned for i in range(len(ids))]
    second = [0 if i < start else i - start + 1 for i in range(len(ids))]
    return first, second, start


def turned(x, position):
    """One half of a head [H/2] at one position: feature i with feature i + H/4."""
    quarter = len(x) // 2
    angle = position / 10_000 ** (2 * np.arange(quarter) / len(x))
    a, b = x[:quarter], x[quarter:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def logits(tensors, ids, where=None):
    """[T, V] of one row; `where` in the place of `positions(ids)`."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    N, T, L = SIZES["num_attention_heads"], len(ids), SIZES["num_layers"]
    H, alpha = SIZES["hidden_size"] // N, (2 * L) ** 0.5
    first, second, start = where or positions(ids)

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        scaled = (x - x.mean(-1, keepdims=True)) / spread
        return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

    def attention(x, at):
        mixed = linear(x, f"{at}.attention.query_key_value").reshape(T, N, 3 * H)
        out = np.zeros((T, N, H))
        for n in range(N):
            q, k, v = mixed[:, n, :H], mixed[:, n, H : 2 * H], mixed[:, n, 2 * H :]
            q, k = (
                np.stack(
                    [
                        np.concatenate(
                            [turned(y[i, : H // 2], first[i]), turned(y[i, H // 2 :], second[i])]
                        )
                        for i in range(T)
                    ]
                )
                for y in (q, k)
            )
            for i in range(T):
                seen = [j for j in range(T) if j <= i or j < start]
                powers = np.exp(k[seen] @ q[i] / np.sqrt(H))
                out[i, n] = powers / powers.sum() @ v[seen]
        return linear(out.reshape(T, -1), f"{at}.attention.dense")

    x = t["transformer.word_embeddings.weight"][ids]
    for layer in range(L):
        at = f"transformer.layers.{layer}"
        n = norm(x, f"{at}.input_layernorm")
        h = alpha * n + attention(n, at)
        m = norm(h, f"{at}.post_attention_layernorm")
        z = linear(m, f"{at}.mlp.dense_h_to_4h")
        z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        x = alpha * m + linear(z, f"{at}.mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ t["lm_head.weight"].T
