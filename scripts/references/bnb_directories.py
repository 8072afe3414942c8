"""Make tests/hub/fixtures/bitsandbytes: tiny LLaMAs that transformers saved quantized.

    .references/venv/bin/python scripts/references/bnb_directories.py [FOLDER]

CASE/ is the directory as `save_pretrained` writes it; CASE/expected.safetensors holds the matrices
that bitsandbytes makes of some of its tensors, by their names, and the logits of PROMPT.
"""

import copy
import sys
import tempfile
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).parents[2] / "tests" / "hub" / "fixtures" / "bitsandbytes"
PROMPT = [1, 5, 9, 3, 40, 22, 47, 8, 11, 2, 35, 7]
# Blocks of 64 do not fill rows of 96 columns: those of down_proj run on from row to row.
SIZES = dict(
    vocab_size=48,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.2,
)
FOUR = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
SKIPPED = dict(llm_int8_skip_modules=["v_proj", "lm_head"])
CASES = {
    "nf4_double": (dict(FOUR, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), {}),
    "fp4": (dict(FOUR, bnb_4bit_quant_type="fp4", **SKIPPED), dict(num_hidden_layers=1)),
    "int8": (
        dict(load_in_8bit=True),
        dict(hidden_size=32, intermediate_size=48, num_attention_heads=2),
    ),
}
COMPARED = ("layers.0.self_attn.k_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.q_proj")


def dense(module: torch.nn.Linear) -> torch.Tensor:
    weight = module.weight
    if isinstance(weight, bnb.nn.Params4bit):
        # As one row: with AVX512 the library takes other scales where blocks do not end with rows.
        state = copy.copy(weight.quant_state)
        shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
        return bnb.functional.dequantize_4bit(weight.data, state).float().reshape(shape)
    if isinstance(weight, bnb.nn.Int8Params):
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scale).float()
    return weight.data.float()


def make(name: str, fields: dict, sizes: dict, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as plain:
        LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).save_pretrained(plain)
        model = LlamaForCausalLM.from_pretrained(
            plain,
            quantization_config=BitsAndBytesConfig(**fields),
            device_map={"": "cpu"},
            dtype=torch.float32,
        ).eval()
    model.save_pretrained(folder / name)
    found = {
        f"{path}.weight": dense(module).contiguous()
        for path, module in model.named_modules()
        if path.endswith(COMPARED)
    }
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):  # its product has that fault too
            module.forward = partial(torch.nn.functional.linear, weight=dense(module))
    with torch.no_grad():
        found["logits"] = model(torch.tensor([PROMPT])).logits[0].float()
    save_file(found, folder / name / "expected.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES
    for number, (name, (fields, sizes)) in enumerate(CASES.items()):
        make(name, fields, sizes, number, target)
