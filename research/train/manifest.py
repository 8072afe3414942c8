"""A manifest of sha256s that proves that a directory is what was written.

Orbax restores a flipped bit silently. `manifest.json` lists every other file with its size and
sha256 and carries the sha256 of that list; its bytes must be exactly the canonical text, so that a
flip anywhere in the manifest shows too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


class DamagedError(RuntimeError):
    """A directory is not what its manifest says."""


def write(directory: Path) -> None:
    """Write the manifest of `directory`, after every file in it has reached the disk."""
    entries = {name: _entry(directory / name) for name in _files(directory)}
    path = directory / NAME
    with path.open("wb") as file:
        file.write(_text(entries))
        file.flush()
        os.fsync(file.fileno())


def check(directory: Path) -> None:
    """DamagedError, naming the file, when anything differs from the manifest."""
    entries = _read(directory / NAME)
    present = set(_files(directory))
    for name in sorted(set(entries) | present):
        if name not in present:
            raise DamagedError(f"{name} is missing")
        if name not in entries:
            raise DamagedError(f"{name} is not in the manifest")
        expected, actual = entries[name]["bytes"], (directory / name).stat().st_size
        if actual != expected:
            raise DamagedError(f"{name} has {actual} bytes, expected {expected}")
        if _sha256(directory / name) != entries[name]["sha256"]:
            raise DamagedError(f"{name}: its sha256 differs from the manifest's")


def _files(directory: Path) -> list[str]:
    found = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in found)
    return sorted(name for name in names if name != NAME)


def _entry(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(entries: dict) -> bytes:
    listed = json.dumps(entries, sort_keys=True)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": digest}, sort_keys=True).encode()


def _read(path: Path) -> dict:
    if not path.is_file():
        raise DamagedError(f"{NAME} is missing")
    raw = path.read_bytes()
    try:
        entries = json.loads(raw)["files"]
        intact = raw == _text(entries)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{NAME} does not carry its own sha256")
    return entries
