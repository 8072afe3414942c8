"""Write a directory beside its final place, then put it there: all of it or nothing.

The guarantee is for exceptions. A process that is killed may leave `.NAME.partial-*` beside the
place, which later saves sweep away, and, killed between the two renames of a replacement, the old
directory as `.NAME.previous-*` with nothing at NAME: the next save puts it back first. One process
writes to one place at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from research.hub.checkpoint import CheckpointError

STALE_S = 86_400  # a partial directory untouched for a day belongs to no living save


@contextlib.contextmanager
def replacing(directory: str | Path, marker: str) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the place of `directory` when the block ends.

    Should the block raise (a full disk, say), the sibling is removed and `directory` is as it was.
    An existing directory is replaced whole, and only when it holds the file `marker` or is empty:
    anything else is not ours to delete.
    """
    directory = Path(directory).absolute()
    recover(directory)
    if directory.exists():
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: is a file; expected a directory or nothing")
        if any(directory.iterdir()) and not (directory / marker).exists():
            raise CheckpointError(
                f"{directory}: exists and holds no {marker}; refusing to replace what is in it"
            )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        yield partial
        _flush(partial)
        _swap(partial, directory)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: could not be written ({error}); what was there before is unchanged"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def left_behind(directory: Path) -> list[Path]:
    """What a save killed between its renames moved out of the way of `directory`, newest last."""
    found = [path for path in siblings(directory, "previous") if any(path.iterdir())]
    return sorted(found, key=lambda path: path.stat().st_ctime_ns)


def siblings(directory: Path, kind: str) -> list[Path]:
    start = f".{directory.name}.{kind}-"
    if not directory.parent.is_dir():
        return []
    return [path for path in directory.parent.iterdir() if path.name.startswith(start)]


def recover(directory: Path) -> None:
    """Undo what killed saves left: the old directory back in its place, their rests removed."""
    kept = left_behind(directory)
    if kept and not directory.exists():
        os.rename(kept.pop(), directory)
    if directory.exists():
        for path in siblings(directory, "previous"):
            shutil.rmtree(path, ignore_errors=True)
    for path in siblings(directory, "partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bytes on disk before the name changes: a full disk may only show here."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, directory: Path) -> None:
    mask = _umask()  # temporary directories and safetensors files are born private
    partial.chmod(0o777 & ~mask)
    for path in partial.iterdir():
        path.chmod(0o666 & ~mask)
    if not directory.exists():
        os.rename(partial, directory)
        return
    previous = Path(tempfile.mkdtemp(prefix=f".{directory.name}.previous-", dir=directory.parent))
    os.rename(directory, previous)
    try:
        os.rename(partial, directory)
    except OSError:
        os.rename(previous, directory)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
