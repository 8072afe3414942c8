"""Make tests/hub/fixtures: tiny random models and what `transformers` computes for them.

    .references/venv/bin/python scripts/references/hub_fixtures.py tiny
    .references/venv/bin/python scripts/references/hub_fixtures.py adapters
    .references/venv/bin/python scripts/references/hub_fixtures.py smollm2 MODEL.gguf

tiny_llama/CASE holds a model directory and expected.safetensors (logits and gradients for the
prompts in prompts.json); adapters/CASE a PEFT adapter of the case 'gqa', its logits, and for some
the gradients of its factors. smollm2.json holds, for the prompts in it, logits at a few vocabulary
entries, the log-sum-exp at every position, 64 greedy tokens, and the ids of its own tokenizer.
"""

import json
import sys
from pathlib import Path

import torch
from hub_logits import answer, open_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).parents[2] / "tests" / "hub" / "fixtures"
PROMPTS = [[1, 5, 9, 3, 60, 22, 47, 8, 11, 2, 35, 7], [4, 61, 4, 19, 33]]
SMALL = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=4,  # not hidden_size / num_attention_heads
    max_position_embeddings=128,
    initializer_range=0.3,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CASES = {
    "gqa": {},
    "tied_biased": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama3": dict(head_dim=8, rope_parameters=LLAMA3),
}
ADAPTERS = {
    "attention": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "ragged": dict(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj", "gate_proj"],
        layers_to_transform=[1],
    ),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"model.layers.1.self_attn.v_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
    ),
    "embeddings": dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "down_proj"]),
}

WITH_GRADIENTS = ("attention", "embeddings")


def make_tiny() -> None:
    for number, (name, fields) in enumerate(CASES.items()):
        torch.manual_seed(number)
        write_case("tiny_llama", name, LlamaForCausalLM(LlamaConfig(**SMALL | fields)))


def write_case(family: str, name: str, model: torch.nn.Module) -> None:
    """A model directory with prompts, logits and gradients in it."""
    model.eval()
    for parameter in model.parameters():  # norms and biases begin as constants
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = FIXTURES / family / name
    model.save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    found = answer(model, {"prompts": PROMPTS, "gradients": True})
    save_file(found, folder / "expected.safetensors")


def make_adapters() -> None:
    for number, (name, fields) in enumerate(ADAPTERS.items()):
        torch.manual_seed(number)
        base = open_model(FIXTURES / "tiny_llama" / "gqa")
        model = get_peft_model(base, LoraConfig(**fields)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:  # the second factor begins as zero
                parameter.data = 0.3 * torch.randn_like(parameter)
        folder = FIXTURES / "adapters" / name
        model.save_pretrained(folder)
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace(str(FIXTURES.parents[2]) + "/", ""))
        (folder / "README.md").unlink()
        found = answer(model, {"prompts": PROMPTS, "gradients": name in WITH_GRADIENTS})
        save_file(found, folder / "expected.safetensors")


def make_smollm2(path: Path) -> None:
    file = FIXTURES / "smollm2.json"
    record = json.loads(file.read_text())
    request = {"prompts": [case["ids"] for case in record["cases"]], "greedy": 64}
    found = answer(open_model(path), request)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for number, case in enumerate(record["cases"]):
        logits = found[f"logits.{number}"].double()
        case["logits"] = [
            [round(x, 5) for x in row] for row in logits[:, record["vocabulary"]].tolist()
        ]
        case["log_sum_exp"] = [round(x, 5) for x in logits.logsumexp(-1).tolist()]
        case["greedy"] = found[f"greedy.{number}"].tolist()
        if not any(character.isdigit() for character in case["text"]):
            # transformers drops the splitting of digits that this file's tokenizer asks for
            case["reference_ids"] = tokenizer(case["text"], add_special_tokens=False).input_ids
    file.write_text(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1] == "smollm2":
        make_smollm2(Path(sys.argv[2]))
    else:
        {"tiny": make_tiny, "adapters": make_adapters}[sys.argv[1]]()
