"""Writes tests/adapters/fixtures/prefix_NAME.safetensors: prefix tuning as peft computes it.

    .references/venv/bin/python scripts/references/peft_prefix.py

On a committed tiny LLaMA with grouped heads, without the MLP (`table`) and with it (`mlp`), every
leaf of the prefix is drawn anew. A file holds each leaf by peft's name, its gradient grad.NAME for
the sum over prompts of the mean next-token negative log-likelihood, and logits.I [T, V] for the
prompts in the model's prompts.json.
"""

import json
from pathlib import Path

import torch
from hub_logits import answer, open_model
from peft import PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import save_file

TESTS = Path(__file__).parents[2] / "tests"
MODEL = TESTS / "hub" / "fixtures" / "tiny_llama" / "gqa"
CONFIGS = {
    "table": dict(num_virtual_tokens=5),
    "mlp": dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
}


def short(name: str) -> str:
    return name.split("prompt_encoder.default.")[-1]


def main() -> None:
    prompts = json.loads((MODEL / "prompts.json").read_text())
    for number, (name, options) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, **options)
        model = get_peft_model(open_model(MODEL), config).eval()
        found = {}
        for leaf_name, leaf in model.named_parameters():
            if leaf.requires_grad:
                leaf.data = torch.randn_like(leaf)
                found[short(leaf_name)] = leaf.data.clone()
        for key, value in answer(model, {"prompts": prompts, "gradients": True}).items():
            found[f"grad.{short(key)}" if key.startswith("grad.") else key] = value
        path = TESTS / "adapters" / "fixtures" / f"prefix_{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(found, path)


if __name__ == "__main__":
    main()
