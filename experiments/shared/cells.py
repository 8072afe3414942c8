"""The rows of a sweep by what was varied, for tables and figures."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from research.runs import results
from research.runs.canonical import to_json


def cells(
    rows: Sequence[results.Row], base: Any, **labels: Mapping[str, Any]
) -> dict[tuple[str, ...], results.Group]:
    """{(label, ...): runs that differ in their seed only}, in the order of the labels.

    `labels` gives for each varied field {label: value}; a field inside another is named as in an
    override, cells(rows, base, **{"recipe.lr": ...}). Rows that differ from `base` elsewhere, or
    have other values, were not of the sweep and are left out.
    """

    def fixed(config: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in ("seed", *labels):
            config = _without(config, name.split("."))
        return config

    names = [{_text(to_json(v)): label for label, v in each.items()} for each in labels.values()]
    found = {}
    for group in results.groups(
        [row for row in rows if fixed(row["config"]) == fixed(to_json(base))]
    ):
        config = group.rows[0]["config"]
        pairs = zip(names, labels, strict=True)
        key = tuple(known.get(_text(_value(config, field))) for known, field in pairs)
        if None not in key:
            found[key] = group
    order = [list(each) for each in labels.values()]
    place = lambda key: [each.index(label) for each, label in zip(order, key, strict=True)]  # noqa: E731
    return {key: found[key] for key in sorted(found, key=place)}


def markdown(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    shown = [heads, ["---"] * len(heads), *lines]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in shown)


def _without(config: Any, path: Sequence[str]) -> Any:
    """`config` less the field at `path`; as it is where it has no such field."""
    name, *rest = path
    if not isinstance(config, Mapping) or name not in config:
        return config
    others = {key: value for key, value in config.items() if key != name}
    return {**others, name: _without(config[name], rest)} if rest else others


def _value(config: Any, field: str) -> Any:
    return functools.reduce(lambda node, name: node[name], field.split("."), config)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
