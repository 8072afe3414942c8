"""Values of config fields: parsed from text, and checked against the type that the field has.

bool         true, false              tuple        1,2,3 or (1, 2, 3), () for none
int          8, 1_000, 1e6            function     module:name
float        3e-4, inf                dataclass    module:Class (its defaults) or module:INSTANCE
None         none                     dtype        bfloat16
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import types
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np

UNKNOWN: Any = typing.Any


def convert(value: Any, annotation: Any, current: Any) -> Any:
    """`value` as the field takes it; ValueError says what was expected.

    A string given to a field that is no string is parsed. An int given to a float field becomes a
    float; nothing else changes type.
    """
    kinds = _kinds(annotation, current)
    if isinstance(value, str) and not (kinds == [str] or _literals(kinds)):
        return _parse(value, kinds, current)
    for kind in kinds:
        fitted = _fit(value, kind, current)
        if fitted is not _NO:
            return fitted
    raise ValueError(f"expected {_describe(kinds)}, got {value!r} ({type(value).__name__})")


_NO: Any = object()  # "does not fit", where None is a value


class Component:
    """Any dataclass instance: what a field typed Any takes when it holds one."""


def _kinds(annotation: Any, current: Any) -> list[Any]:
    """The alternatives of an annotation; the present value's type where it leaves all open."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [k for member in typing.get_args(annotation) for k in _kinds(member, current)]
    if annotation is typing.Annotated or hasattr(annotation, "__metadata__"):
        return _kinds(annotation.__origin__, current)
    if annotation in (UNKNOWN, object) or isinstance(annotation, typing.TypeVar):
        return [_kind_of(current)]
    return [type(None) if annotation is None else annotation]


def _kind_of(current: Any) -> Any:
    if current is None:
        return UNKNOWN
    if _is_dtype(current):
        return np.dtype
    if dataclasses.is_dataclass(current) and not isinstance(current, type):
        return Component
    return collections.abc.Callable if callable(current) else type(current)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, np.dtype) or isinstance(getattr(value, "dtype", None), np.dtype)


def _literals(kinds: list[Any]) -> bool:
    return all(typing.get_origin(kind) is typing.Literal for kind in kinds)


def _fit(value: Any, kind: Any, current: Any) -> Any:
    """`value` when it is of this kind (converted where that loses nothing), else _NO."""
    origin = typing.get_origin(kind) or kind
    if kind is UNKNOWN:
        return value
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else _NO
    if kind in (int, float):
        number = int | np.integer if kind is int else int | float | np.number
        return kind(value) if isinstance(value, number) and not isinstance(value, bool) else _NO
    if origin is tuple:
        return _fit_tuple(value, kind, current)
    if origin is collections.abc.Callable:
        return value if callable(value) else _NO
    if origin is np.dtype:
        return value if _is_dtype(value) else _NO
    if origin is Component:
        return value if _kind_of(value) is Component else _NO
    return value if isinstance(origin, type) and isinstance(value, origin) else _NO


def _fit_tuple(value: Any, kind: Any, current: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _NO
    elements = typing.get_args(kind)
    example = current[0] if isinstance(current, tuple) and current else None
    if (len(elements) == 2 and elements[1] is Ellipsis) or not elements:
        return tuple(convert(item, elements[0] if elements else UNKNOWN, example) for item in value)
    if len(elements) != len(value):
        raise ValueError(f"expected {len(elements)} values, got {len(value)}: {value!r}")
    return tuple(convert(i, e, None) for i, e in zip(value, elements, strict=True))


def _parse(text: str, kinds: list[Any], current: Any) -> Any:
    """The value of the first kind, in the order of `_order`, whose text form this is."""
    reason = ""
    for kind in sorted(kinds, key=_order):
        try:
            return text if kind is str else _parse_as(text.strip(), kind, current)
        except (KeyError, OverflowError):
            continue
        except ValueError as error:
            reason = f" ({error})" if str(error) else ""
    raise ValueError(f"expected {_describe(kinds)}, got {text!r}{reason}")


def _order(kind: Any) -> int:
    """None before numbers, numbers before text: 'none' for `str | None` is None."""
    order = [type(None), bool, int, float]
    return order.index(kind) if kind in order else (9 if kind is str else 5)


def _parse_as(text: str, kind: Any, current: Any) -> Any:
    """KeyError or ValueError when `text` is no `kind`."""
    origin = typing.get_origin(kind) or kind
    if kind is type(None):
        return {"none": None, "null": None}[text.lower()]
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if kind in (int, float):
        return _number(text, kind)
    if origin is typing.Literal:
        return {str(choice): choice for choice in typing.get_args(kind)}[text]
    if origin is tuple:
        return _fit_tuple(_split(text), kind, current)
    if kind is np.dtype:
        return _dtype(text)
    if kind is UNKNOWN:
        raise ValueError("the field is None and its annotation does not say what else it may be")
    return _parse_object(text, kind, origin)


def _number(text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        number = float(text) if kind is int else None  # 1e6 for an int
    if number is None or number != int(number):
        raise ValueError("")
    return int(number)


def _dtype(text: str) -> Any:
    scalar = getattr(jnp, text, None)
    if not _is_dtype(scalar):
        raise KeyError(text)
    return scalar


def _parse_object(text: str, kind: Any, origin: Any) -> Any:
    found = resolve(text)
    wants_instance = origin is not collections.abc.Callable and origin is not type
    if wants_instance and isinstance(found, type):
        try:
            found = found()
        except TypeError as error:  # fields without a default
            raise ValueError(f"{text}() cannot be made: {error}") from error
    if _fit(found, kind, None) is _NO:
        raise ValueError(f"{text} is a {type(found).__name__}")
    return found


def _split(text: str) -> list[str]:
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    return [part.strip() for part in text.split(",") if part.strip()]


def resolve(text: str) -> Any:
    """The object that 'module:name' stands for; ValueError says what is missing."""
    module, colon, name = text.partition(":")
    if not colon or not name:
        raise ValueError(f"expected module:name, got {text!r}")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {text!r}: {error}") from error
    return found


def _describe(kinds: list[Any]) -> str:
    names = [getattr(kind, "__name__", None) or str(kind) for kind in kinds]
    named = [str(k) if typing.get_origin(k) else n for k, n in zip(kinds, names, strict=True)]
    return " or ".join("None" if name == "NoneType" else name for name in named)
