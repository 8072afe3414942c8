"""The rows of a sweep by what was varied, for tables and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from research.runs import results
from research.runs.canonical import to_json


def cells(
    rows: Sequence[results.Row], base: Any, **labels: Mapping[str, Any]
) -> dict[tuple[str, ...], results.Group]:
    """{(label, ...): runs that differ in their seed only}, in the order of the labels.

    `labels` gives for each varied field {label: value}. Rows that differ from `base` elsewhere, or
    have other values, were not of the sweep and are left out.
    """
    varied = {"seed", *labels}

    def fixed(config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name not in varied}

    names = [{_text(to_json(v)): label for label, v in each.items()} for each in labels.values()]
    found = {}
    for group in results.groups(
        [row for row in rows if fixed(row["config"]) == fixed(to_json(base))]
    ):
        config = group.rows[0]["config"]
        pairs = zip(names, labels, strict=True)
        key = tuple(known.get(_text(config[field])) for known, field in pairs)
        if None not in key:
            found[key] = group
    order = [list(each) for each in labels.values()]
    place = lambda key: [each.index(label) for each, label in zip(order, key, strict=True)]  # noqa: E731
    return {key: found[key] for key in sorted(found, key=place)}


def markdown(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    shown = [heads, ["---"] * len(heads), *lines]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in shown)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
