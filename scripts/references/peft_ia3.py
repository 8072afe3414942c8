"""Writes tests/weights/fixtures/ia3_NAME.safetensors: (IA)^3 as peft computes it.

    .references/venv/bin/python scripts/references/peft_ia3.py

On two committed tiny models, a LLaMA without biases and a Qwen2 with them, the vectors of k_proj,
v_proj and down_proj are drawn around 1. A file holds ia3.LAYER.MODULE, its gradient
grad.LAYER.MODULE for the sum over prompts of the mean next-token negative log-likelihood, and
logits.I [T, V] for the prompts in the model's prompts.json.
"""

import json
import re
from pathlib import Path

import torch
from hub_logits import answer, open_model
from peft import IA3Config, get_peft_model
from safetensors.torch import save_file

TESTS = Path(__file__).parents[2] / "tests"
MODELS = {"llama": "tiny_llama/gqa", "qwen": "tiny_qwen/tied"}
CONFIG = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])


def short(name: str) -> str:
    layer, module = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.ia3_l", name).groups()
    return f"{layer}.{module}"


def main() -> None:
    for number, (name, folder) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        path = TESTS / "hub" / "fixtures" / folder
        model = get_peft_model(open_model(path), IA3Config(**CONFIG)).eval()
        vectors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = {}
        for vector_name, vector in vectors.items():
            vector.data = 1 + 0.5 * torch.randn_like(vector)
            found[f"ia3.{short(vector_name)}"] = vector.data.flatten().clone()
        prompts = json.loads((path / "prompts.json").read_text())
        for key, value in answer(model, {"prompts": prompts, "gradients": True}).items():
            gradient = key.startswith("grad.")
            found[f"grad.{short(key)}" if gradient else key] = (
                value.flatten() if gradient else value
            )
        save_file(found, TESTS / "weights" / "fixtures" / f"ia3_{name}.safetensors")


if __name__ == "__main__":
    main()
