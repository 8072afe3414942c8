"""One JSON form for every config, so that equal configs have equal run ids.

A config is a frozen dataclass whose fields are plain values, tuples, mappings, functions, Linen
modules and other dataclasses. A dataclass becomes an object with its class under "type", because
AdamW(lr=1e-3) and Lion(lr=1e-3) have the same fields; a function becomes 'module:qualname'.
What has no stable name or text (a lambda, an array, a set) is an error that says where it stands.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from flax import linen as nn


class ConfigError(TypeError):
    """A value in a config has no canonical JSON form."""


def module_name(thing: Any) -> str:
    """The importable module of a function or class, also when it is the script being run."""
    name = thing.__module__
    if name != "__main__":
        return name
    # Under `python -m experiments.x` the module is called __main__; its spec keeps the real name.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else name


def qualified(thing: Any, where: str) -> str:
    """'module:qualname' of a function or class; ConfigError for a lambda or a local function."""
    name = getattr(thing, "__qualname__", None)
    if name is None or "<" in name or not getattr(thing, "__module__", None):
        raise ConfigError(
            f"{where}: {thing!r} has no importable name; define it at the top level of a module"
        )
    return f"{module_name(thing)}:{name}"


def to_json(value: Any, where: str = "config") -> Any:
    """`value` as what `json` can write; ConfigError names the field that has no such form.

    Tuples and lists become lists, non-finite floats the strings 'nan', 'inf', '-inf', NumPy and
    JAX scalars Python numbers. Linen's own fields `parent` and `name` are left out.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, where)
    if isinstance(value, Mapping):
        return {_key(k, where): to_json(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}.{index}") for index, item in enumerate(value)]
    return _named_or_scalar(value, where)


def _named_or_scalar(value: Any, where: str) -> Any:
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if isinstance(value, functools.partial):
        parts = {"args": value.args, "keywords": value.keywords}
        return {"partial": to_json(value.func, where), **to_json(parts, where)}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return to_json(value.item(), where)
    if callable(value):
        return qualified(value, where)
    raise ConfigError(f"{where}: a {type(value).__name__} has no canonical JSON form")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{where}: mapping key {key!r} must be a string")
    return key


def _dataclass(value: Any, where: str) -> dict[str, Any]:
    hidden = {"parent", "name"} if isinstance(value, nn.Module) else set()
    fields = {f.name for f in dataclasses.fields(value)} - hidden
    if "type" in fields:
        raise ConfigError(f"{where}: a field called 'type' clashes with the name of the class")
    named = {name: to_json(getattr(value, name), f"{where}.{name}") for name in sorted(fields)}
    return {"type": qualified(type(value), where), **named}


def canonical(value: Any) -> str:
    """The canonical JSON text: keys sorted, no spaces."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(experiment: str, config: Any) -> str:
    """'experiment-0123456789': the first ten hexadecimal digits of the config's sha256."""
    return f"{experiment}-{hashlib.sha256(canonical(config).encode()).hexdigest()[:10]}"
