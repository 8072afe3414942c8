"""What peft computes for LoRA's kin: tests/weights/fixtures/peft_lora_kin.safetensors.

    .references/venv/bin/python scripts/references/peft_lora_kin.py

On the committed tiny LLaMA 'gqa', for each case of CASES: CASE.param.NAME of every adapter tensor,
CASE.logits.I and CASE.grad.NAME for its prompts as in `hub_logits`. The tensors of dora and vera
are random; those of pissa and olora as peft starts them, with CASE.base.NAME, the changed base. plus
is one step of gradient descent, CASE.after.NAME, by peft's LoRA+ optimizer from random factors.

dropout.* is one DoRA layer whose dropout is the given mask: x, y, its matrices and their gradients
for the sum of y².
"""

from pathlib import Path

import torch
from hub_logits import answer, open_model
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file

TESTS = Path(__file__).parents[2] / "tests"
BASE = TESTS / "hub/fixtures/tiny_llama/gqa"
FIXTURE = TESTS / "weights/fixtures/peft_lora_kin.safetensors"
PROMPTS = [[1, 5, 9, 3, 60, 22, 47, 8], [4, 61, 4, 19, 33]]
LINEAR = ["q_proj", "down_proj"]
CASES = {
    "pissa": LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights="pissa"),
    "olora": LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights="olora"),
    "plus": LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR),
    "dora": LoraConfig(
        r=4, lora_alpha=8, target_modules=[*LINEAR, "embed_tokens", "lm_head"], use_dora=True
    ),
    "vera": VeraConfig(r=6, target_modules=LINEAR, projection_prng_key=3),
}
STEP = {"lr": 0.1, "loraplus_lr_ratio": 5.0}


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "lora_" in name or "vera_" in name
    }


def make_case(name: str, config: LoraConfig | VeraConfig) -> dict[str, torch.Tensor]:
    model = get_peft_model(open_model(BASE), config).eval()
    for tensor_name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in ("pissa", "olora"):
            noise = 0.3 * torch.randn_like(parameter)
            parameter.data = parameter.data.abs() + noise if "magn" in tensor_name else noise
    found = {f"param.{key}": tensor for key, tensor in adapter_tensors(model).items()}
    if name in ("pissa", "olora"):
        found |= {
            f"base.{key}": tensor
            for key, tensor in model.state_dict().items()
            if "base_layer.weight" in key
        }
    found |= answer(model, {"prompts": PROMPTS, "gradients": True})
    if name == "plus":
        create_loraplus_optimizer(model, torch.optim.SGD, **STEP).step()
        found |= {f"after.{key}": tensor for key, tensor in adapter_tensors(model).items()}
    return {f"{name}.{key}": tensor.contiguous().clone() for key, tensor in found.items()}


class Masked(torch.nn.Module):
    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


def make_dropout() -> dict[str, torch.Tensor]:
    plain = torch.nn.Sequential(torch.nn.Linear(7, 5, bias=False))
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    layer = get_peft_model(plain, config).train().base_model.model[0]
    mask = 2.0 * torch.randint(0, 2, (4, 7))
    layer.lora_dropout["default"] = Masked(mask)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    for parameter in (a, b, magnitude):
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(4, 7)
    y = layer(x)
    y.square().sum().backward()
    named = {"a": a, "b": b, "magnitude": magnitude}
    found = {"x": x, "y": y, "mask": mask, "base": layer.base_layer.weight} | named
    found |= {f"grad.{name}": parameter.grad for name, parameter in named.items()}
    return {f"dropout.{name}": tensor.detach().clone() for name, tensor in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = make_dropout()
    for case, config in CASES.items():
        tensors |= make_case(case, config)
    FIXTURE.parent.mkdir(exist_ok=True)
    save_file(tensors, FIXTURE)
