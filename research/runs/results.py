"""Rows of finished runs in a JSONL file, and their statistics over seeds.

Rows are only appended. Where an id has several, the latest counts.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class ResultsError(ValueError):
    """A results file holds a line that is no row."""


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (ddof = 1) of `count` values; std is None for one."""

    mean: float
    std: float | None
    count: int

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.3g}"
        return f"{self.mean:.4g}{spread}"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only: the overrides they share and their rows."""

    overrides: dict[str, Any]
    rows: tuple[Row, ...]

    def statistic(self, name: str) -> Statistic:
        """Of the metric `name` ('eval/nll') over the rows that have it; KeyError when none has."""
        values = [v for row in self.rows if (v := metrics(row).get(name)) is not None]
        if not values:
            raise KeyError(f"no row of {self.overrides} has the metric {name!r}")
        return summary(values)


def summary(values: Sequence[float]) -> Statistic:
    """Statistic of at least one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Statistic(statistics.fmean(values), std, len(values))


def read(path: Path) -> list[Row]:
    """All rows of a file, in order; none when there is no file. ResultsError names the line."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path}:{number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or "id" not in row:
            raise ResultsError(f"{path}:{number}: expected an object with an 'id'")
        rows.append(row)
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each id, in the order in which the ids first came."""
    return list({row["id"]: row for row in rows}.values())


def append(path: Path, row: Row) -> None:
    """Adds one row and waits until the disk has it; a failed write leaves the file as it was."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(f"{path}: the disk took only a part of the row")
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


def metrics(row: Row) -> dict[str, float]:
    """The numbers among a row's metrics, nested ones as 'a/b'."""
    return dict(_numbers(row["metrics"], ""))


def _numbers(value: Any, name: str) -> Iterable[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}/{key}" if name else key)
    elif isinstance(value, bool):
        yield name, float(value)
    elif isinstance(value, int | float):
        yield name, value
    elif value in ("nan", "inf", "-inf"):
        yield name, float(value)


def groups(rows: Sequence[Row]) -> list[Group]:
    """Latest rows gathered by their config without its seed, in the order of the file."""
    gathered: dict[str, list[Row]] = {}
    for row in latest(rows):
        config = {key: value for key, value in row["config"].items() if key != "seed"}
        gathered.setdefault(json.dumps(config, sort_keys=True), []).append(row)
    return [Group(_shared(found), tuple(found)) for found in gathered.values()]


def _shared(rows: list[Row]) -> dict[str, Any]:
    return {key: value for key, value in rows[0]["overrides"].items() if key != "seed"}


def markdown(rows: Sequence[Row], names: Sequence[str] | None = None, show: Callable = str) -> str:
    """A table with a line a group: its overrides, the count of seeds, each metric as mean ± std."""
    found = groups(rows)
    if names is None:
        names = list(dict.fromkeys(name for row in latest(rows) for name in metrics(row)))
    fields = list(dict.fromkeys(field for group in found for field in group.overrides))
    lines = [_line([*fields, "seeds", *names]), _line(["---"] * (len(fields) + 1 + len(names)))]
    for group in found:
        cells = [brief(group.overrides.get(field, "")) for field in fields]
        has = {name for row in group.rows for name in metrics(row)}
        values = [show(group.statistic(name)) if name in has else "" for name in names]
        lines.append(_line([*cells, str(len(group.rows)), *values]))
    return "\n".join(lines) + "\n"


def brief(value: Any) -> str:
    """A config value in its JSON form, short: the class of a dataclass, the name of a function."""
    if isinstance(value, dict) and "type" in value:
        value = value["type"]
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    named = re.fullmatch(r"[A-Za-z_][\w.]*:([A-Za-z_][\w.]*)", text)
    return named[1] if named else text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
