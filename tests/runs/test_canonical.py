import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.runs.canonical import ConfigError, canonical, run_id, to_json


@dataclasses.dataclass(frozen=True)
class Part:
    lr: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Other:
    lr: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    part: Any = Part()
    value: Any = None


class Net(nn.Module):
    width: int
    activation: Any = jax.nn.silu


def of(value):
    return to_json(Config(value=value))["value"]


def test_each_kind_of_value_has_the_stated_form():
    assert of((1, 2.5, "x", None, True)) == [1, 2.5, "x", None, True]
    assert of(jax.nn.relu).endswith(":relu")
    assert of(float("inf")) == "inf"
    assert of(np.float32(0.5)) == of(jnp.asarray(0.5)) == 0.5
    assert of(np.dtype("bfloat16")) == {"dtype": "bfloat16"}
    assert of(Path("a") / "b") == "a/b"
    assert of({"k": (1,)}) == {"k": [1]}
    partial = of(functools.partial(of, value=3))
    assert partial == {"partial": f"{__name__}:of", "args": [], "keywords": {"value": 3}}


def test_linen_modules_are_their_fields_without_linens_own():
    net = of(Net(4))
    assert net.keys() == {"type", "width", "activation"}
    assert (net["type"], net["width"]) == (f"{__name__}:Net", 4)


def test_the_class_counts_and_the_order_of_a_mapping_does_not():
    assert run_id("x", Config(Part())) != run_id("x", Config(Other()))
    assert run_id("x", Config(value={"a": 1, "b": 2})) == run_id(
        "x", Config(value={"b": 2, "a": 1})
    )
    assert run_id("x", Config(value=1)) != run_id("x", Config(value=2))


def test_the_text_is_pinned_and_the_id_is_its_hash():
    text = canonical(Config(value=(1, 2)))
    assert text == (
        f'{{"part":{{"lr":0.001,"type":"{__name__}:Part"}},'
        f'"type":"{__name__}:Config","value":[1,2]}}'
    )
    import hashlib

    digest = hashlib.sha256(text.encode()).hexdigest()
    assert run_id("lora_rank", Config(value=(1, 2))) == f"lora_rank-{digest[:10]}"
    assert json.loads(text)["part"]["lr"] == 1e-3


@pytest.mark.parametrize("value", [lambda x: x, np.zeros(2), {1, 2}, {1: 2}, object()])
def test_values_without_a_stable_form_are_errors_that_name_the_field(value):
    with pytest.raises(ConfigError, match=r"config\.value"):
        canonical(Config(value=value))


def test_a_function_has_the_same_name_in_the_module_that_is_run(tmp_path):
    (tmp_path / "question.py").write_text(
        "from research.runs.canonical import to_json\n"
        "def loss(): ...\n"
        "if __name__ == '__main__': print(to_json(loss))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "question"],
        env={"PYTHONPATH": f"{tmp_path}:{root}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "question:loss"
