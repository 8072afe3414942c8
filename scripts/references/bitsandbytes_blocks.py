"""What bitsandbytes makes of a few arrays on a CPU: tests/codes/fixtures/bitsandbytes.safetensors.

    .references/venv/bin/python scripts/references/bitsandbytes_blocks.py [FOLDER]

With a folder it writes bitsandbytes.safetensors there, and large.safetensors: the same of larger arrays.
Of each array x, CASE.x: CASE.TYPE.{packed,absmax,values}, and with the scales in 8 bits
CASE.TYPE.{codes,absmax2,offset,values2}. One thread, because the mean of many scales depends on it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[2] / "tests" / "codes" / "fixtures"


def arrays(seed: int, rows: int, odd: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    few = np.zeros((4, 64))
    few[2, 5] = -0.3
    found = {
        "random": rng.normal(size=(rows, 192)),
        "spread": rng.normal(size=(rows, 64)) * np.exp(2 * rng.normal(size=(rows, 1))),
        "constant": np.full((5, 64), -0.37),
        "zero": np.zeros((4, 64)),
        "nearly_zero": few,
        "odd": rng.normal(size=odd),
        "denormal": np.concatenate([rng.normal(size=64) * 1e-40, rng.normal(size=64)]),
    }
    return {name: x.astype(np.float32) for name, x in found.items()}


def four_bits(x: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    packed, plain = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
    again, nested = functional.quantize_4bit(
        x, blocksize=64, quant_type=kind, compress_statistics=True
    )
    assert torch.equal(packed, again)
    return {
        "packed": packed.flatten(),
        "absmax": plain.absmax,
        "values": functional.dequantize_4bit(packed, plain).reshape(x.shape),
        "codes": nested.absmax,
        "absmax2": nested.state2.absmax,
        "offset": nested.offset,
        "values2": functional.dequantize_4bit(packed, nested).reshape(x.shape),
    }


def eight_bits(x: torch.Tensor, signed: bool) -> dict[str, torch.Tensor]:
    codes, state = functional.quantize_blockwise(
        x if signed else x.abs(), functional.create_dynamic_map(signed), blocksize=256
    )
    values = functional.dequantize_blockwise(codes, state)
    return {"codes": codes, "absmax": state.absmax, "values": values}


def of(seed: int, rows: int, odd: int) -> dict[str, torch.Tensor]:
    found = {
        "dynamic": functional.create_dynamic_map(True),
        "dynamic_unsigned": functional.create_dynamic_map(False),
    }
    for name, x in arrays(seed, rows, odd).items():
        x = torch.from_numpy(x)
        found[f"{name}.x"] = x
        parts = {kind: four_bits(x, kind) for kind in ("nf4", "fp4")}
        parts |= {"signed": eight_bits(x, True), "unsigned": eight_bits(x, False)}
        for kind, tensors in parts.items():
            found |= {f"{name}.{kind}.{part}": tensor for part, tensor in tensors.items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES
    folder.mkdir(parents=True, exist_ok=True)
    save_file(of(seed=0, rows=12, odd=731), folder / "bitsandbytes.safetensors")
    if folder != FIXTURES:
        save_file(of(seed=1, rows=700, odd=70_001), folder / "large.safetensors")
