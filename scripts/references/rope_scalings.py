"""What `transformers` computes for RoPE scalings: tests/models/fixtures/rope_scalings.json.

    .references/venv/bin/python scripts/references/rope_scalings.py

Writes {case: [rope_parameters, head size, frequencies, attention factor]} for a LlamaConfig.
"""

import json
from pathlib import Path

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "linear": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 8),
    "llama3.1": (
        {**LLAMA3, "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192},
        32,
    ),
    "llama3 without original length": ({**LLAMA3, "rope_theta": 1e4, "factor": 32.0}, 16),
    "yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
        32,
    ),
    "yarn, other turns and a given attention factor": (
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 40.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.7,
        },
        32,
    ),
    "yarn without original length": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1.5},
        16,
    ),
    "yarn, one index only": (
        {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 1.5,
            "beta_slow": 1.5,
        },
        8,
    ),
}
LENGTH = 4096  # max_position_embeddings
FIXTURE = Path(__file__).parents[2] / "tests/models/fixtures/rope_scalings.json"

if __name__ == "__main__":
    table = {}
    for name, (given, size) in CASES.items():
        config = LlamaConfig(
            hidden_size=2 * size,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            rope_parameters=dict(given),
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, "cpu")
        table[name] = given, size, [float(f"{x:.8g}") for x in frequencies.tolist()], factor
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(table, indent=1) + "\n")
