"""What peft computes for AdaLoRA: tests/weights/fixtures/adalora.safetensors.

    HF_HUB_OFFLINE=1 .references/venv/bin/python scripts/references/peft_adalora.py

AdaLoRA on q and v of tests/hub/fixtures/tiny_llama/gqa, trained for ten steps by `FIRST`. Layers
are stacked, and names are those of the matrices (q, v) and factors (a, e, b), in peft's layout
(a [R, in], e [R, 1], b [out, R]):

    weight.q.a, grad.q.a    [10, L, ...]  after optimizer.step(), and the gradient it used
    masked.q.e              [10, L, R]    after update_and_allocate
    keep.NAME.q             [10, L, R]    of `CASES`: the allocator sees the same weights and gradients
    budget.NAME             [10]
    prompt, logits          [T], [T, V]   at the end
    final.q.a, final_grad.q.a             at the end, of nll + 0.5 * the orthogonal regulariser
"""

import json
from pathlib import Path

import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
BASE = ROOT / "tests/hub/fixtures/tiny_llama/gqa"
FIXTURE = ROOT / "tests/weights/fixtures/adalora.safetensors"
STEPS, LAYERS, RANK, TARGET = 10, 2, 6, 2
FIRST = dict(tinit=2, tfinal=2, deltaT=1)
CASES = {
    "every": FIRST,
    "spaced": dict(tinit=1, tfinal=3, deltaT=3, beta1=0.6, beta2=0.9),
    "whole": dict(tinit=0, tfinal=0, deltaT=2),
}
FACTORS = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}


def adapted(fields: dict):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        total_step=STEPS,
        lora_alpha=12,
        orth_reg_weight=0.5,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",  # else the loss comes without the regulariser
        **fields,
    )
    return get_peft_model(base, config)


def stacked(model, kind: str, of) -> torch.Tensor:
    """[L, ...] of a factor 'q.a', `of` each parameter."""
    module, factor = kind.split(".")
    name = f"{module}_proj.{FACTORS[factor]}.default"
    found = [p for n, p in model.named_parameters() if n.endswith(name)]
    assert len(found) == LAYERS
    return torch.stack([of(p).detach().clone() for p in found])


KINDS = [f"{module}.{factor}" for module in "qv" for factor in FACTORS]


def train(model, prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ten steps, in peft's order: backward, optimizer.step, update_and_allocate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = {}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(prompts[step % 2], labels=prompts[step % 2]).loss.backward()
        optimizer.step()
        for kind in KINDS:
            found.setdefault(f"weight.{kind}", []).append(stacked(model, kind, lambda p: p))
            found.setdefault(f"grad.{kind}", []).append(stacked(model, kind, lambda p: p.grad))
        model.base_model.update_and_allocate(step)
        for kind in ("q.e", "v.e"):
            found.setdefault(f"masked.{kind}", []).append(stacked(model, kind, lambda p: p)[..., 0])
    return {name: torch.stack(values) for name, values in found.items()}


def replay(fields: dict, recorded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks and budgets of an allocator that is shown the recorded weights and gradients."""
    model = adapted(fields)
    allocator, found = model.base_model.rankallocator, {"budget": [], "q": [], "v": []}
    for step in range(1, STEPS + 1):
        for kind in KINDS:
            module, factor = kind.split(".")
            name = f"{module}_proj.{FACTORS[factor]}.default"
            parameters = [p for n, p in model.named_parameters() if n.endswith(name)]
            for layer, parameter in enumerate(parameters):
                parameter.data = recorded[f"weight.{kind}"][step - 1, layer].clone()
                parameter.grad = recorded[f"grad.{kind}"][step - 1, layer].clone()
        model.base_model.update_and_allocate(step)
        found["budget"].append(torch.tensor(allocator.budget_schedule(step)[0]))
        for module in "qv":
            found[module].append(stacked(model, f"{module}.e", lambda p: p != 0)[..., 0])
    return {name: torch.stack(values) for name, values in found.items()}


def finish(model, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(prompt, labels=prompt)
    out.loss.backward()
    found = {"prompt": prompt[0].clone(), "logits": out.logits[0].detach().clone()}
    for kind in KINDS:
        found[f"final.{kind}"] = stacked(model, kind, lambda p: p)
        found[f"final_grad.{kind}"] = stacked(model, kind, lambda p: p.grad)
    return found


if __name__ == "__main__":
    torch.set_num_threads(2)
    prompts = [torch.tensor([ids]) for ids in json.loads((BASE / "prompts.json").read_text())]
    model = adapted(FIRST)
    recorded = train(model, prompts)
    found = {**recorded, **finish(model, prompts[0])}
    for name, fields in CASES.items():
        replayed = replay(fields, recorded)
        found[f"budget.{name}"] = replayed.pop("budget")
        found |= {f"keep.{name}.{module}": keep for module, keep in replayed.items()}
    FIXTURE.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, FIXTURE)
