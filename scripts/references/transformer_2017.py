"""What torch.nn.Transformer computes: tests/models/fixtures/transformer_{post,pre}.safetensors.

    .references/venv/bin/python scripts/references/transformer_2017.py

A tiny encoder–decoder with ReLU and without dropout; the embedding, its scale, the sinusoids and the
tied output are written out here. In the 2017 form (post) there is no norm after the stacks, in the
pre-norm form there is one. Each file holds the batch, weight.NAME, grad.NAME of the label-smoothed
loss (mean over the targets that are not padding), `loss`, and `logits` [B, T, V].
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

V, D, HEADS, FFN, LAYERS, PAD = 19, 8, 2, 12, 2, 0
SOURCE = [[3, 9, 4, 4, 17, 2], [8, 5, 2, PAD, PAD, PAD], [6, 7, 1, 12, 2, PAD]]
TARGET = [[1, 11, 7, 9, 2], [1, 5, 2, PAD, PAD], [1, 18, 3, 2, PAD]]
FIXTURES = Path(__file__).parents[2] / "tests/models/fixtures"


def sinusoids(length: int) -> torch.Tensor:
    """PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i+1) = cos of the same: [length, D]."""
    rows = [
        [(math.cos if i % 2 else math.sin)(t / 10_000 ** (i // 2 * 2 / D)) for i in range(D)]
        for t in range(length)
    ]
    return torch.tensor(rows)


def transformer(pre_norm: bool) -> nn.Transformer:
    layer = {"dropout": 0.0, "activation": "relu", "batch_first": True, "norm_first": pre_norm}
    norms = [nn.LayerNorm(D) if pre_norm else None for _ in range(2)]
    encoder_layer = nn.TransformerEncoderLayer(D, HEADS, FFN, **layer)
    decoder_layer = nn.TransformerDecoderLayer(D, HEADS, FFN, **layer)
    encoder = nn.TransformerEncoder(encoder_layer, LAYERS, norms[0], enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(decoder_layer, LAYERS, norms[1])
    return nn.Transformer(
        D, HEADS, custom_encoder=encoder, custom_decoder=decoder, batch_first=True
    )


def spread(module: nn.Module) -> None:
    """Weights large enough that an error anywhere shows in the logits."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 0.3)
        if ".norm" in name and name.endswith("weight"):
            parameter.data += 1


def answer(pre_norm: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(V, D), "transformer": transformer(pre_norm)})
    spread(model)
    source, target = torch.tensor(SOURCE), torch.tensor(TARGET)
    inputs, targets = target[:, :-1], target[:, 1:]
    embed = [model["embed"](x) * math.sqrt(D) + sinusoids(x.shape[1]) for x in (source, inputs)]
    hidden = model["transformer"](
        *embed,
        tgt_mask=torch.ones(inputs.shape[1], inputs.shape[1]).triu(1).bool(),
        src_key_padding_mask=source == PAD,
        tgt_key_padding_mask=inputs == PAD,
        memory_key_padding_mask=source == PAD,
    )
    logits = hidden @ model["embed"].weight.T
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=PAD)
    loss = criterion(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    found = {"source": source, "target": target, "logits": logits.detach(), "loss": loss.detach()}
    for name, parameter in model.named_parameters():
        found |= {f"weight.{name}": parameter.data, f"grad.{name}": parameter.grad}
    return {name: value.contiguous() for name, value in found.items()}


if __name__ == "__main__":
    for name in ("post", "pre"):
        save_file(answer(name == "pre"), FIXTURES / f"transformer_{name}.safetensors")
