"""The adapters that peft saved (scripts/references/peft_directories.py), and copies to spoil."""

import functools
import json

from hub_reference import FIXTURES, ROOT
from safetensors.numpy import load_file, save_file

from research import hub

ADAPTERS = FIXTURES / "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


@functools.cache
def opened(folder):
    return hub.load(folder)


def base_path(name):
    return ROOT / config_of(ADAPTERS / name)["base_model_name_or_path"]


def base_of(name):
    """The model that an adapter names."""
    return opened(base_path(name))


def prompts_of(base):
    return json.loads((base / "prompts.json").read_text())


def expected_of(name):
    """The last prompt of an adapter's base, and what peft computes for it."""
    expected = load_file(ADAPTERS / name / "expected.safetensors")
    return prompts_of(base_path(name))[-1], expected["logits.0"]


def change_config(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | fields))


def change_tensors(folder, change):
    """`change(name, tensor) -> {name: tensor}` of every tensor."""
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for n, x in tensors.items() for k, v in change(n, x).items()}, folder / WEIGHTS)
