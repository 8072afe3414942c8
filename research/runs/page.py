"""A finished run's page for people, from its row and its directory.

Curves come from metrics.jsonl, answers from samples.jsonl ({"prompt", "before", "after"} a line),
and the comparison from the row's metrics: each pair `before/NAME` and `after/NAME`. A file that a
run did not write is a section that its page does not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from research import report
from research.runs import results

LOWER = ("nll", "loss", "perplexity", "bits_per_byte", "error")
HIGHER = ("accuracy", "reward", "score", "win_rate")
NAME = "report.html"


def write(row: results.Row, directory: Path) -> Path:
    """`directory`/report.html, whole or not at all."""
    curves, samples = lines(directory / "metrics.jsonl"), lines(directory / "samples.jsonl")
    return report.write(directory / NAME, row, curves, comparison(row), samples)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none when there is no file."""
    if not path.exists():
        return []
    # Not splitlines(): texts may hold U+2028 and other line ends of Unicode unescaped.
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def comparison(row: results.Row) -> list[dict[str, Any]]:
    """before_after rows of the metrics that come as a pair.

    `NAME_low` and `NAME_high` are the interval of NAME and not rows of their own.
    """
    found = results.metrics(row)
    pairs = []
    for name in found:
        measure = name.removeprefix("before/")
        if measure == name or f"after/{measure}" not in found or is_bound(measure, found):
            continue
        pair: dict[str, Any] = {"name": measure}
        for side in ("before", "after"):
            pair[side] = found[f"{side}/{measure}"]
            bounds = [found.get(f"{side}/{measure}_{end}") for end in ("low", "high")]
            if None not in bounds:
                pair[f"{side}_interval"] = tuple(bounds)
        for better, words in (("lower", LOWER), ("higher", HIGHER)):
            if any(word in measure for word in words):
                pair["better"] = better
        pairs.append(pair)
    return pairs


def is_bound(measure: str, found: dict[str, float]) -> bool:
    base, _, end = measure.rpartition("_")
    return end in ("low", "high") and f"before/{base}" in found
