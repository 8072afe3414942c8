"""Make tests/hub/fixtures/tiny_{glm,baichuan}: tiny random models and what `transformers` computes.

    .references/venv/bin/python scripts/references/glm_baichuan_fixtures.py

tiny_glm holds directories of GlmForCausalLM as hub_fixtures.py writes them: two groups of three
heads, a head size that does not follow from the width, and what ChatGLM2 and 3 compute too.

tiny_baichuan/CASE.safetensors holds weight.NAME in LLaMA's names, logits.I and grad.NAME for
hub_fixtures.PROMPTS. `alibi` is a LlamaForCausalLM whose position ids are all 0, where RoPE turns
nothing, with a float mask that carries Bloom's ALiBi; `norm_head` one whose head's rows are normalised besides; `rope` a plain one.
"""

import torch
from hub_fixtures import FIXTURES, PROMPTS, write_case
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.parametrize import register_parametrization
from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

GLM = dict(
    vocab_size=64,
    hidden_size=20,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
    rms_norm_eps=1e-5,
    attention_bias=True,
    pad_token_id=0,
    eos_token_id=2,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
)
LLAMA = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=6,
    max_position_embeddings=64,
    initializer_range=0.3,
    rms_norm_eps=1e-6,
    attn_implementation="eager",
)


class Normalized(torch.nn.Module):
    def forward(self, weight):
        return normalize(weight)


def alibi_mask(heads: int, length: int) -> torch.Tensor:
    """[1, heads, length, length]: slope * key index, and -inf above the diagonal."""
    bias = build_alibi_tensor(torch.ones(1, length), heads, torch.float32)
    above = torch.full((length, length), float("-inf")).triu(1)
    return bias.reshape(1, heads, 1, length) + above


def baichuan(name: str, alibi: bool, norm_head: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = {f"weight.{n}": value.clone() for n, value in model.state_dict().items()}
    if norm_head:
        register_parametrization(model.lm_head, "weight", Normalized())
    for number, ids in enumerate(PROMPTS):
        tokens, T = torch.tensor([ids]), len(ids)
        how = dict(position_ids=torch.zeros(1, T, dtype=int), attention_mask=alibi_mask(6, T))
        logits = model(tokens, **(how if alibi else {})).logits[0]
        cross_entropy(logits[:-1], tokens[0, 1:]).backward()
        found[f"logits.{number}"] = logits.detach()
    for full, parameter in model.named_parameters():
        plain = full.replace("parametrizations.weight.original", "weight")
        found[f"grad.{plain}"] = parameter.grad
    folder = FIXTURES / "tiny_baichuan"
    folder.mkdir(exist_ok=True)
    save_file(found, folder / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.manual_seed(0)
    write_case("tiny_glm", "biased", GlmForCausalLM(GlmConfig(**GLM)))
    plain = dict(attention_bias=False, tie_word_embeddings=True, num_key_value_heads=1)
    write_case("tiny_glm", "tied", GlmForCausalLM(GlmConfig(**GLM | plain)))
    for case, alibi, norm_head in (
        ("rope", False, False),
        ("alibi", True, False),
        ("norm_head", True, True),
    ):
        baichuan(case, alibi, norm_head)
