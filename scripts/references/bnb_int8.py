"""Writes tests/weights/fixtures/bnb_int8.safetensors: LLM.int8() as bitsandbytes computes it on a CPU.

    .references/venv/bin/python scripts/references/bnb_int8.py

x [24, 64] and weight [40, 64] are numbers of 16 bits, x with outliers in features 5 and 40 at 6.0 and
above. For each threshold T: codes.T and scale.T of x, features.T that hold outliers, output.T [24, 40],
and output.one.T [1, 40] for the first row alone. weight.codes and weight.scale are those of the matrix.
"""

from pathlib import Path

import bitsandbytes.functional as F
import torch
from safetensors.torch import save_file

FILE = Path(__file__).parents[2] / "tests" / "weights" / "fixtures" / "bnb_int8.safetensors"


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 64, generator=generator)
    x[3, 5], x[0, 40], x[7, 40] = 6.0, -21.0, 9.5
    return x.half(), torch.randn(40, 64, generator=generator).half()


def product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, threshold: float) -> tuple:
    steps, size, features = F.int8_vectorwise_quant(x.clone(), threshold=threshold)
    features = torch.empty(0, dtype=torch.int64) if features is None else features
    output, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x.float(), steps, codes, size, scale, features, None
    )
    return steps, size, features, output


def main() -> None:
    x, weight = inputs()
    codes, scale, _ = F.int8_vectorwise_quant(weight.clone())
    found = {"x": x.float(), "weight": weight.float(), "weight.codes": codes, "weight.scale": scale}
    for threshold in (0.0, 2.5, 6.0):
        parts = product(x, codes, scale, threshold)
        for name, value in zip(("codes", "scale", "features", "output"), parts, strict=True):
            found[f"{name}.{threshold}"] = value.contiguous()
        found[f"output.one.{threshold}"] = product(x[:1], codes, scale, threshold)[-1].contiguous()
    save_file(found, FILE)


if __name__ == "__main__":
    main()
