"""Writes tests/evaluate/fixtures/attention_weights.safetensors: attention weights of transformers.

    .references/venv/bin/python scripts/references/attention_weights.py

For tiny committed models: NAME.tokens [T] and NAME.weights [L, N, T, T].
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parents[2] / "tests"
MODELS = ("tiny_llama/gqa", "tiny_gpt/gpt2", "tiny_qwen/alternating")
LENGTH = 12


@torch.no_grad()
def main() -> None:
    found = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(
            TESTS / "hub" / "fixtures" / name, attn_implementation="eager"
        ).eval()
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, (LENGTH,), generator=rng)
        weights = model(tokens[None], output_attentions=True).attentions
        found[f"{name}.tokens"] = tokens
        found[f"{name}.weights"] = torch.stack([layer[0] for layer in weights])
    path = TESTS / "evaluate" / "fixtures" / "attention_weights.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(found, path)


if __name__ == "__main__":
    main()
