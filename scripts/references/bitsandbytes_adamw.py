"""Where bitsandbytes' AdamW8bit goes in 100 steps on a CPU: tests/train/fixtures/adamw8bit.safetensors.

    .references/venv/bin/python scripts/references/bitsandbytes_adamw.py [FOLDER]

Of each leaf: NAME.start, NAME.eight and NAME.float (the parameters after 100 steps with 8-bit and
with float32 moments), NAME.checksum (the sum of all gradients), and for leaves large enough to have
8-bit moments NAME.first.{state1,state2,absmax1,absmax2}, the moments after the first step.
"""

import sys
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[2] / "tests" / "train" / "fixtures"
SHAPES = {"kernel": (64, 80), "odd": (4099,), "small": (100,)}
STEPS = 100
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)


def start(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.normal(size=list(SHAPES.values())[number]).astype(np.float32)


def gradient(number: int, step: int) -> np.ndarray:
    """Each entry has a size of its own, which stays, and a direction it prefers."""
    shape = list(SHAPES.values())[number]
    own = np.random.default_rng(100 + number)
    size, mean = np.exp(0.7 * own.normal(size=shape)), own.normal(size=shape)
    noise = np.random.default_rng([number, step]).normal(size=shape)
    return (size * (mean + noise)).astype(np.float32)


def run(bits: int) -> dict[str, torch.Tensor]:
    leaves = [torch.nn.Parameter(torch.from_numpy(start(n))) for n in range(len(SHAPES))]
    kind = bnb.optim.AdamW8bit if bits == 8 else bnb.optim.AdamW32bit
    optimizer, found = kind(leaves, **SETTINGS), {}
    for step in range(STEPS):
        for number, leaf in enumerate(leaves):
            leaf.grad = torch.from_numpy(gradient(number, step))
        optimizer.step()
        if step or bits == 32:
            continue
        for name, leaf in zip(SHAPES, leaves, strict=True):
            state = optimizer.state[leaf]
            parts = ("state1", "state2", "absmax1", "absmax2")
            if state["state1"].dtype == torch.uint8:
                found |= {f"{name}.first.{part}": state[part].clone() for part in parts}
    name_of = "eight" if bits == 8 else "float"
    return found | {f"{n}.{name_of}": p.data for n, p in zip(SHAPES, leaves, strict=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES
    folder.mkdir(parents=True, exist_ok=True)
    found = run(8) | run(32)
    for number, name in enumerate(SHAPES):
        found[f"{name}.start"] = torch.from_numpy(start(number))
        total = sum(gradient(number, step).sum(dtype=np.float64) for step in range(STEPS))
        found[f"{name}.checksum"] = torch.tensor(total, dtype=torch.float32)
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()},
        folder / "adamw8bit.safetensors",
    )
