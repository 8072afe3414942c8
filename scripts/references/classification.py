"""Make tests/models/fixtures/classification: what transformers' classifying LLaMA computes.

    .references/venv/bin/python scripts/references/classification.py

The folder holds a tiny random LlamaForCausalLM, and expected.safetensors: the padded `tokens`, and
for LlamaForSequenceClassification on the same trunk, with three labels (`classify`) and as a
regression with one (`regress`): its score matrix, logits, labels, loss, and the loss's gradients for
the score matrix and the first layer's q_proj.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

FOLDER = Path(__file__).parents[2] / "tests" / "models" / "fixtures" / "classification"
CONFIG = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
    tie_word_embeddings=False,
    pad_token_id=0,
)
TOKENS = [[1, 5, 9, 3, 40, 22, 47], [4, 31, 4, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0]]
LABELS = {"classify": torch.tensor([2, 0, 1]), "regress": torch.tensor([[0.5], [-1.0], [2.0]])}
KIND = {"classify": "single_label_classification", "regress": "regression"}


def answers(trunk: LlamaForCausalLM, name: str) -> dict[str, torch.Tensor]:
    labels = LABELS[name]
    outputs = 3 if name == "classify" else 1
    config = LlamaConfig(**CONFIG, num_labels=outputs, problem_type=KIND[name])
    model = LlamaForSequenceClassification(config).eval()
    model.model.load_state_dict(trunk.model.state_dict())
    tokens = torch.tensor(TOKENS)
    found = model(tokens, attention_mask=(tokens != 0).long(), labels=labels)
    found.loss.backward()
    return {
        f"{name}.score": model.score.weight.detach(),
        f"{name}.labels": labels,
        f"{name}.logits": found.logits.detach(),
        f"{name}.loss": found.loss.detach(),
        f"{name}.score_gradient": model.score.weight.grad,
        f"{name}.query_gradient": model.model.layers[0].self_attn.q_proj.weight.grad,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    trunk = LlamaForCausalLM(LlamaConfig(**CONFIG))
    trunk.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    found = {"tokens": torch.tensor(TOKENS)}
    for name in LABELS:
        found |= answers(trunk, name)
    save_file(found, FOLDER / "expected.safetensors")
