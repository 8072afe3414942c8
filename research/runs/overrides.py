"""Strict overrides of a nested frozen config: `override(config, {"optim.lr": 1e-3})`.

A name is a dotted path through dataclass fields, tuple positions and mapping keys. An unknown name
is an error that shows the closest ones. The type of a field is kept: its annotation says which
values it takes, and where it says nothing (no annotation, or Any) the present value does.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from research.runs.values import UNKNOWN, convert


class OverrideError(ValueError):
    """An override names no field of the config, or gives it a value that it cannot take."""


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
    """`config` with the named fields replaced, in order; strings are parsed by the field's type."""
    for name, value in overrides.items():
        config = _replace(config, config, name.split("."), name, value)
    return config


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """['optim.lr=1e-3'] -> {'optim.lr': '1e-3'}; OverrideError without '=' or when set twice."""
    overrides: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise OverrideError(f"--set {assignment!r}: expected FIELD=VALUE")
        if name in overrides:
            raise OverrideError(f"--set {name}: given twice")
        overrides[name] = value
    return overrides


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Every name that an override of `config` may use, nested ones after their parent."""
    names = []
    for key, value in _children(config).items():
        names.append(prefix + key)
        names += field_names(value, f"{prefix}{key}.")
    return names


def lookup(config: Any, name: str) -> Any:
    """The value that the dotted `name` stands for; OverrideError when there is none."""
    node = config
    for part in name.split("."):
        children = _children(node)
        if part not in children:
            raise _unknown(config, name)
        node = children[part]
    return node


def _children(node: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        hidden = {"parent", "name"} if isinstance(node, nn.Module) else set()
        fields = (f.name for f in dataclasses.fields(node) if f.init and f.name not in hidden)
        return {name: getattr(node, name) for name in fields}
    if isinstance(node, Mapping):
        return {str(key): value for key, value in node.items()}
    if isinstance(node, tuple):
        return {str(index): value for index, value in enumerate(node)}
    return {}


def _replace(root: Any, node: Any, parts: list[str], name: str, value: Any) -> Any:
    part, rest = parts[0], parts[1:]
    children = _children(node)
    if part not in children:
        raise _unknown(root, name)
    if rest:
        new = _replace(root, children[part], rest, name, value)
    else:
        try:
            new = convert(value, _annotation(node, part), children[part])
        except ValueError as error:
            raise OverrideError(f"{name}: {error}") from error
    return _rebuild(node, part, new, name)


def _rebuild(node: Any, part: str, new: Any, name: str) -> Any:
    if isinstance(node, tuple):
        items = [new if str(index) == part else item for index, item in enumerate(node)]
        return type(node)(*items) if hasattr(node, "_fields") else tuple(items)
    if isinstance(node, Mapping):
        return type(node)({**node, part: new})
    try:
        return (
            node.clone(**{part: new})
            if isinstance(node, nn.Module)
            else (dataclasses.replace(node, **{part: new}))
        )
    except (ValueError, TypeError) as error:  # the config's own __post_init__ said no
        raise OverrideError(f"{name}={new!r}: {error}") from error


def _annotation(node: Any, part: str) -> Any:
    """The annotation of a dataclass field, UNKNOWN where there is none that can be read."""
    if not dataclasses.is_dataclass(node):
        return UNKNOWN
    try:
        return typing.get_type_hints(type(node)).get(part, UNKNOWN)
    except NameError:  # a name imported for type checkers only: the present value decides
        return UNKNOWN


def _unknown(root: Any, name: str) -> OverrideError:
    names = field_names(root)
    last = name.rsplit(".", 1)[-1]
    same = [known for known in names if known.rsplit(".", 1)[-1] == last]
    close = list(dict.fromkeys(same + difflib.get_close_matches(name, names, n=5, cutoff=0.5)))
    hint = f"closest: {', '.join(close[:5])}" if close else f"fields: {', '.join(names[:20])}"
    return OverrideError(f"{type(root).__name__} has no field {name!r}; {hint}")
