"""Rows of local files: JSON, JSONL, Parquet and text as a Hugging Face `Dataset`, with places.

A file is read whole and nothing is fetched. A bad row is an error that names file and line; it is
skipped and counted only when that is asked for, because a silently shorter data set is a different
experiment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
import pyarrow.parquet

Row = dict[str, Any]
OnBad = Literal["raise", "skip"]


class RowError(ValueError):
    """A row is malformed or lacks a field, or a file has no rows; the message names the place."""


@dataclass(frozen=True)
class Rows:
    """A data set and where each row came from ("file.jsonl:17"), and how many were skipped."""

    dataset: datasets.Dataset
    places: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        """(place, row); a field that a row lacks is None."""
        return zip(self.places, self.dataset, strict=True)


def read(
    path: str | Path, required: Sequence[str] = (), on_bad: OnBad = "raise", suffix: str = ""
) -> Rows:
    """The rows of a .json (a list of objects), .jsonl, .parquet or .txt file (one row a line,
    field "text", empty lines left out).

    Every row must have the fields `required`, not null. Raises RowError naming file and line; with
    on_bad="skip" bad rows are left out and counted. A file without rows is always an error.
    `suffix` overrides the file name's.
    """
    path = Path(path)
    kind = (suffix or path.suffix).lower()
    if kind not in READERS:
        raise RowError(f"{path}: unknown kind {kind!r}; expected one of {sorted(READERS)}")
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad {on_bad!r}; expected 'raise' or 'skip'")
    if not path.exists():
        raise RowError(f"{path}: no such file")
    good, places, skipped = [], [], 0
    for place, row in READERS[kind](path):
        problem = _problem(row, required)
        if problem is None:
            good.append(row)
            places.append(place)
        elif on_bad == "skip":
            skipped += 1
        else:
            raise RowError(f"{place}: {problem}")
    if not good:
        raise RowError(f"{path}: empty data set ({skipped} rows skipped)")
    return Rows(_dataset(good, path), tuple(places), skipped)


def from_list(rows: Sequence[Row], name: str = "rows") -> Rows:
    """Rows that are in memory already; places are "NAME row 0", ..."""
    if not rows:
        raise RowError(f"{name}: empty data set")
    places = tuple(f"{name} row {index}" for index in range(len(rows)))
    return Rows(_dataset(rows, Path(name)), places)


def _problem(row: Row | RowError, required: Sequence[str]) -> str | None:
    if isinstance(row, RowError):
        return str(row)
    if not isinstance(row, dict):
        return f"a row must be an object, got {type(row).__name__}"
    missing = [field for field in required if row.get(field) is None]
    if missing:
        return f"lacks field {missing[0]!r}; it has {sorted(row)}"
    return None


def _dataset(rows: Sequence[Row], path: Path) -> datasets.Dataset:
    fields = dict.fromkeys(field for row in rows for field in row)
    columns = {field: [row.get(field) for row in rows] for field in fields}
    try:
        # Fields of mixed types (content as a string here, as parts there) stay JSON values.
        return datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, TypeError) as error:
        raise RowError(f"{path}: rows do not form one table: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> Row | RowError:
    try:
        return json.loads(line.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8: {error}")
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} at column {error.colno}")


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError(f"{path}: not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise RowError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(rows, list):
        raise RowError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{path} row {index}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise RowError(f"{path}: not a Parquet file: {error}") from error
    for index, row in enumerate(table.to_pylist()):
        yield f"{path} row {index}", row


def _read_text(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = {"text": line.decode("utf-8").rstrip("\r\n")}
                except UnicodeDecodeError as error:
                    row = RowError(f"not UTF-8: {error}")
                yield f"{path}:{number}", row


READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
