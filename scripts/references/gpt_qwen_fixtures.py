"""Make tests/hub/fixtures/tiny_{gpt,qwen}: tiny random models and what `transformers` computes.

    .references/venv/bin/python scripts/references/gpt_qwen_fixtures.py

As hub_fixtures.py does for tiny_llama, with shapes that no mistake survives: heads that are no
power of two, head sizes that do not follow from the width, windows shorter than the prompts.
"""

import torch
from hub_fixtures import write_case
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

GPT = dict(vocab_size=64, n_positions=24, initializer_range=0.3)
QWEN = dict(
    vocab_size=64,
    hidden_size=20,
    intermediate_size=24,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    initializer_range=0.3,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
SLIDING = dict(use_sliding_window=True, sliding_window=4)
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def openai(**fields):
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**GPT | fields))


def gpt2(**fields):
    return GPT2LMHeadModel(GPT2Config(**GPT | fields))


def qwen(**fields):
    return Qwen2ForCausalLM(Qwen2Config(**QWEN | fields))


CASES = {
    "tiny_gpt": {
        "gpt1": (openai, dict(n_embd=18, n_layer=2, n_head=3)),
        "gpt2": (gpt2, dict(n_embd=20, n_layer=3, n_head=5, n_inner=28)),
        "gpt2_untied": (gpt2, dict(n_embd=12, n_layer=2, n_head=3, tie_word_embeddings=False)),
    },
    "tiny_qwen": {
        "tied": (qwen, dict(num_hidden_layers=2, tie_word_embeddings=True, rms_norm_eps=1e-5)),
        "sliding": (qwen, dict(num_hidden_layers=3, max_window_layers=1, **SLIDING)),
        "alternating": (qwen, dict(num_hidden_layers=4, layer_types=ALTERNATING, **SLIDING)),
    },
}

if __name__ == "__main__":
    torch.set_num_threads(2)
    for family, cases in CASES.items():
        for number, (name, (make, fields)) in enumerate(cases.items()):
            torch.manual_seed(number)
            write_case(family, name, make(**fields))
