"""Write a directory beside its final place, then put it there: all of it or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from research.hub.checkpoint import CheckpointError


@contextlib.contextmanager
def replacing(directory: str | Path, marker: str) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the place of `directory` when the block ends.

    Should the block raise (a full disk, say), the sibling is removed and `directory` is as it was.
    An existing directory is replaced whole, and only when it holds the file `marker` or is empty:
    anything else is not ours to delete.
    """
    directory = Path(directory).absolute()
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
