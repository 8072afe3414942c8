"""Make tests/hub/fixtures/adapters: directories as peft saves them, a kind of adapter each.

    HF_HUB_OFFLINE=1 .references/venv/bin/python scripts/references/peft_directories.py [CASE ...]

`hub_fixtures.py adapters` makes those of plain LoRA. Each case has random numbers, except that the
AdaLoRA 'adalora' is trained until peft has allocated its ranks, and expected.safetensors with the
logits for the last prompt of its base, which base_model_name_or_path names.
"""

import json
import sys
from pathlib import Path

import torch
from hub_logits import answer, open_model
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests/hub/fixtures"
LLAMA, QWEN, GPT = "tiny_llama/gqa", "tiny_qwen/tied", "tiny_gpt/gpt2"
DORA = dict(r=3, lora_alpha=6, use_dora=True)
STEPS = 6
TRIPLETS = dict(
    init_r=4, target_r=2, lora_alpha=8, tinit=1, tfinal=1, total_step=STEPS, orth_reg_weight=0.1
)
PROMPT = dict(num_virtual_tokens=3, task_type="CAUSAL_LM")
CASES = {
    "rslora": (
        LLAMA,
        LoraConfig(
            r=8,
            lora_alpha=4,
            target_modules=["k_proj", "up_proj"],
            use_rslora=True,
            rank_pattern={"up_proj": 2},
            alpha_pattern={"layers.1.mlp.up_proj": 3},
        ),
    ),
    "dora": (LLAMA, LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"], **DORA)),
    "dora_ragged": (
        QWEN,
        LoraConfig(target_modules=["k_proj", "down_proj"], layers_to_transform=[1], **DORA),
    ),
    "conv1d": (GPT, LoraConfig(r=3, lora_alpha=6, target_modules=["attn.c_proj", "c_fc"])),
    "adalora": (LLAMA, AdaLoraConfig(target_modules=["q_proj", "v_proj"], **TRIPLETS)),
    "adalora_whole": (QWEN, AdaLoraConfig(target_modules=["k_proj", "gate_proj"], **TRIPLETS)),
    "ia3": (LLAMA, IA3Config(target_modules=["k_proj", "v_proj", "down_proj", "lm_head"],
                             feedforward_modules=["down_proj"])),
    "ia3_biased": (QWEN, IA3Config(target_modules=r".*\.1\..*(k_proj|o_proj)",
                                   feedforward_modules=r".*o_proj")),
    "prompt_tuning": (LLAMA, PromptTuningConfig(**PROMPT)),
    "p_tuning": (QWEN, PromptEncoderConfig(encoder_hidden_size=8, **PROMPT)),
    "prefix_tuning": (LLAMA, PrefixTuningConfig(**PROMPT)),
    "prefix_projected": (
        QWEN,
        PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **PROMPT),
    ),
}  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """What is trained, off its beginning: (IA)^3 around ones, lengths near what they were."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.3 * torch.randn_like(parameter)
            kept = "ia3_" in name or "magnitude" in name or "prompt_encoder" in name
            parameter.data = parameter.data + noise if kept else noise


def allocate(model: torch.nn.Module, prompts: list[torch.Tensor]) -> None:
    """A few steps of training, in peft's order, at the end of which ranks are fixed."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(prompts[step % 2], labels=prompts[step % 2]).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)


def make(name: str, base: Path, config) -> None:
    prompts = json.loads((base / "prompts.json").read_text())
    model = get_peft_model(open_model(base), config).eval()
    randomize(model)
    if name == "adalora":
        allocate(model, [torch.tensor([ids]) for ids in prompts])
    folder = FIXTURES / "adapters" / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    written = folder / "adapter_config.json"
    written.write_text(written.read_text().replace(f"{ROOT}/", ""))
    with torch.no_grad():
        expected = answer(open_model(base, str(folder)), {"prompts": prompts[-1:]})
        held = answer(model, {"prompts": prompts[-1:]})
    # What peft reads is what it had.
    torch.testing.assert_close(expected["logits.0"], held["logits.0"], rtol=0, atol=1e-5)
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, (name, (base, config)) in enumerate(CASES.items()):
        if name in sys.argv[1:] or not sys.argv[1:]:
            torch.manual_seed(number)
            make(name, FIXTURES / base, config)
