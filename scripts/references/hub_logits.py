"""What `transformers` computes for a model file: logits, greedy continuations, gradients.

Run with the reference libraries' own interpreter:

    .references/venv/bin/python scripts/references/hub_logits.py REQUESTS.json

REQUESTS is a list of {"model": directory or .gguf file, "prompts": [[ids]], "out": file}, and
where wanted "greedy": tokens, "gradients": true, "adapter": PEFT directory. `out` will hold
logits.I [T, V], greedy.I [tokens], and grad.NAME for the sum over prompts of the mean next-token
negative log-likelihood.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def open_model(path: Path, adapter: str | None = None):
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if where else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def greedy(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """[count] tokens of highest probability, stopping at nothing."""
    cache, found = None, []
    with torch.no_grad():
        for _ in range(count):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(ids.item())
    return torch.tensor(found)


def gradients(model, prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for ids in prompts:
        model(ids, labels=ids).loss.backward()
    return {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def answer(model, request: dict) -> dict[str, torch.Tensor]:
    prompts = [torch.tensor([ids]) for ids in request["prompts"]]
    found = {}
    for number, ids in enumerate(prompts):
        with torch.no_grad():
            found[f"logits.{number}"] = model(ids).logits[0].clone()
        if request.get("greedy"):
            found[f"greedy.{number}"] = greedy(model, ids, request["greedy"])
    if request.get("gradients"):
        found |= gradients(model, prompts)
    return found


if __name__ == "__main__":
    torch.set_num_threads(2)
    for request in json.loads(Path(sys.argv[1]).read_text()):
        model = open_model(Path(request["model"]), request.get("adapter"))
        save_file(answer(model, request), request["out"])
