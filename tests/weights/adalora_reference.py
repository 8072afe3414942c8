"""What scripts/references/peft_adalora.py recorded, in our layout."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

RECORD = load_file(Path(__file__).parent / "fixtures" / "adalora.safetensors")
BASE = Path(__file__).parents[1] / "hub" / "fixtures" / "tiny_llama" / "gqa"


def triplets(name):
    """{a, e, b} of 'weight.q', ...: a [..., in, R], e [..., R], b [..., R, out]."""
    a, e, b = (RECORD[f"{name}.{factor}"] for factor in "aeb")
    return {"a": np.swapaxes(a, -1, -2), "e": e[..., 0], "b": np.swapaxes(b, -1, -2)}
