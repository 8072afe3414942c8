"""The frequencies and attention factors that `transformers` computes for RoPE scalings, as JSON.

    .references/venv/bin/python scripts/references/rope_scalings.py [CONFIGS.json]

Without a file: for the configs of tests/models/test_rope_reference.py, which keeps the output.
CONFIGS is {name: config.json fields of a LlamaForCausalLM}.
"""

import json
import sys
from pathlib import Path

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "models"))


def computed(fields: dict) -> dict:
    config = LlamaConfig(num_attention_heads=2, hidden_size=2 * fields["head_dim"], **fields)
    kind = config.rope_parameters["rope_type"]
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return {"frequencies": [float(f"{x:.8g}") for x in frequencies.tolist()], "factor": factor}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        configs = json.loads(Path(sys.argv[1]).read_text())
    else:
        recorded = Path(__file__).parents[2] / "tests" / "models" / "rope_cases.json"
        configs = json.loads(recorded.read_text())
    print(json.dumps({name: computed(fields) for name, fields in configs.items()}, indent=1))
