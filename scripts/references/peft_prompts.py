"""What peft computes with learned prompts: tests/weights/fixtures/peft_prompts.safetensors.

    HF_HUB_OFFLINE=1 .references/venv/bin/python scripts/references/peft_prompts.py

On the committed tiny LLaMA 'gqa', for each case of CASES (prompt tuning, P-tuning with its MLP and
with its LSTM): CASE.param.NAME of every tensor of the prompt encoder, CASE.rows [P, D] that it gives,
CASE.logits.I [P + T, V], and CASE.grad.NAME for the sum over PROMPTS of the mean next-token negative
log-likelihood, the text's first token included, which the last virtual token predicts.
"""

import json
from pathlib import Path

import torch
from hub_logits import answer, open_model
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file

TESTS = Path(__file__).parents[2] / "tests"
BASE = TESTS / "hub/fixtures/tiny_llama/gqa"
FIXTURE = TESTS / "weights/fixtures/peft_prompts.safetensors"
COMMON = dict(task_type="CAUSAL_LM", num_virtual_tokens=5)
CASES = {
    "rows": PromptTuningConfig(**COMMON),
    "mlp": PromptEncoderConfig(**COMMON, encoder_hidden_size=6),
    "lstm": PromptEncoderConfig(
        **COMMON, encoder_hidden_size=6, encoder_reparameterization_type="LSTM"
    ),
}


def make_case(config: PromptTuningConfig | PromptEncoderConfig) -> dict[str, torch.Tensor]:
    model = get_peft_model(open_model(BASE), config).eval()
    trained = {
        name.removeprefix("prompt_encoder.default."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for parameter in trained.values():
        parameter.data = 0.5 * torch.randn_like(parameter)
    prompts = json.loads((BASE / "prompts.json").read_text())[:2]
    found = answer(model, {"prompts": prompts, "gradients": True})
    named = {name.replace("prompt_encoder.default.", ""): value for name, value in found.items()}
    named |= {f"param.{name}": parameter.detach() for name, parameter in trained.items()}
    return named | {"rows": model.get_prompt_embedding_to_save("default").detach()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for number, (case, config) in enumerate(CASES.items()):
        torch.manual_seed(number)
        found |= {f"{case}.{name}": value for name, value in make_case(config).items()}
    save_file({name: value.contiguous().clone() for name, value in found.items()}, FIXTURE)
