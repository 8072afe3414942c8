import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from research.runs import override
from research.runs.overrides import OverrideError, field_names, parse_assignments


@dataclasses.dataclass(frozen=True)
class AdamW:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Lion:
    lr: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Needy:
    lr: float


@dataclasses.dataclass(frozen=True)
class Config:
    optim: AdamW | Lion = AdamW()
    activation: Callable = jax.nn.silu
    dtype: Any = jnp.float32
    net: nn.Module = dataclasses.field(default_factory=lambda: nn.Dense(4))
    part: Any = AdamW()
    layers: tuple[int, int] = (2, 3)
    stacks: tuple = (AdamW(), AdamW(lr=2.0))
    steps: int = 10
    limit: int | None = None
    name: str = "a"
    label: str | None = None
    kind: Literal["cosine", "constant"] = "cosine"
    packed: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError("steps must not be negative")


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", "1", 1.0),
        ("optim.betas", "0.8,0.9", (0.8, 0.9)),
        ("optim.betas", "()", ()),
        ("layers", "(4, 5)", (4, 5)),
        ("steps", "1e3", 1000),
        ("steps", "1_000", 1000),
        ("limit", "none", None),
        ("limit", "7", 7),
        ("name", "none", "none"),
        ("name", "12", "12"),
        ("label", "none", None),
        ("label", "x=y", "x=y"),
        ("kind", "constant", "constant"),
        ("packed", "false", False),
        ("activation", "jax.nn:relu", jax.nn.relu),
        ("dtype", "bfloat16", jnp.bfloat16),
        ("net.features", "8", 8),
        ("stacks.1.lr", "0.5", 0.5),
        ("optim", f"{__name__}:Lion", Lion()),
        ("part", f"{__name__}:Lion", Lion()),
    ],
)
def test_text_is_parsed_by_the_type_of_the_field(name, text, value):
    config = override(Config(), {name: text})
    found = config
    for part in name.split("."):
        found = found[int(part)] if isinstance(found, tuple) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    assert Config() == Config(seed=0)  # the original is untouched


def test_values_of_a_sweep_keep_their_type():
    config = override(Config(), {"optim": Lion(), "optim.lr": 1, "steps": 3, "limit": 4})
    assert config.optim == Lion(1.0)
    assert type(config.optim.lr) is float
    assert (config.steps, config.limit) == (3, 4)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("optim.lrr", 1, "optim.lr"),
        ("lr", 1, "optim.lr"),
        ("optim.lr.x", 1, "has no field 'optim.lr.x'"),
        ("stacks.2.lr", 1, "has no field"),
        ("net.parent", None, "has no field"),
        ("steps", 1.5, "steps: expected int, got 1.5"),
        ("steps", "1.5", "steps: expected int, got '1.5'"),
        ("steps", True, "expected int"),
        ("packed", 1, "expected bool"),
        ("packed", "maybe", "expected bool, got 'maybe'"),
        ("layers", "1,2,3", "expected 2 values, got 3"),
        ("kind", "linear", "cosine"),
        ("optim", "jax.nn:relu", "expected AdamW or Lion"),
        ("part", f"{__name__}:Needy", "missing 1 required positional argument"),
        ("activation", "jax.nn:reluu", "cannot find 'jax.nn:reluu'"),
        ("activation", "relu", "expected module:name"),
        ("dtype", "float33", "float33"),
        ("steps", -1, "steps=-1: steps must not be negative"),
        ("limit", "many", "expected int or None"),
    ],
)
def test_what_is_refused_and_what_the_message_says(name, value, words):
    with pytest.raises(OverrideError) as caught:
        override(Config(), {name: value})
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_assignments_of_the_command_line():
    assert parse_assignments(["a.b=1", "c=x=y"]) == {"a.b": "1", "c": "x=y"}
    for bad in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(OverrideError):
            parse_assignments(bad)


def test_names_cover_nested_fields_but_not_linens_own():
    names = field_names(Config())
    assert {"optim", "optim.lr", "stacks.0.betas", "net.features"} <= set(names)
    assert not {"net.parent", "net.name"} & set(names)
