"""Writes tests/weights/fixtures/combine.safetensors: weighted sums of LoRAs as peft makes them.

    .references/venv/bin/python scripts/references/peft_combine.py

On the committed tiny LLaMA stand three adapters: `first` and `second` of rank 4 and `wide` of rank 6,
on different modules and with different alphas. The file holds their factors as NAME.LAYER.MODULE.A
and .B; for each combination in COMBINATIONS the same of the adapter that add_weighted_adapter makes,
and COMBINATION.logits.I [T, V] for the prompts in the model's prompts.json; and mixed.logits.I of
one batch in which every row has an adapter of its own (ROWS).
"""

import json
import re
from pathlib import Path

import torch
from hub_logits import open_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

TESTS = Path(__file__).parents[2] / "tests"
BASE = TESTS / "hub" / "fixtures" / "tiny_llama" / "gqa"
ADAPTERS = {
    "first": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "second": dict(r=4, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
    "wide": dict(r=6, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
}
COMBINATIONS = {
    "linear": (["first", "second"], [0.7, -1.3], {}),
    "svd": (["first", "second", "wide"], [0.5, -0.4, 1.1], dict(svd_rank=3)),
    "cat": (["first", "wide"], [0.6, -0.9], {}),
}
ROWS = ["second", "__base__", "first", "wide", "first"]


def factors(model, adapter: str) -> dict[str, torch.Tensor]:
    pattern = rf"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.{adapter}\.weight"
    matches = {name: re.search(pattern, name) for name, _ in model.named_parameters()}
    return {
        f"{adapter}." + ".".join(matches[name].groups()): parameter.data.clone()
        for name, parameter in model.named_parameters()
        if matches[name]
    }


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    names = list(ADAPTERS)
    model = get_peft_model(open_model(BASE), LoraConfig(**ADAPTERS[names[0]]), names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**ADAPTERS[name]))
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    for name in names:
        found |= factors(model, name)
    prompts = [torch.tensor([ids]) for ids in json.loads((BASE / "prompts.json").read_text())]
    for kind, (of, weights, more) in COMBINATIONS.items():
        model.add_weighted_adapter(of, weights, kind, combination_type=kind, **more)
        model.set_adapter(kind)
        found |= factors(model, kind)
        for number, ids in enumerate(prompts):
            found[f"{kind}.logits.{number}"] = model(ids).logits[0].clone()
    model.eval()
    batch = prompts[0].repeat(len(ROWS), 1)
    found["mixed.logits"] = model(batch, adapter_names=ROWS).logits.clone()
    (TESTS / "weights" / "fixtures").mkdir(exist_ok=True)
    save_file(
        {name: t.contiguous() for name, t in found.items()},
        TESTS / "weights/fixtures/combine.safetensors",
    )


if __name__ == "__main__":
    main()
