"""A lock on a run's directory: two processes that save there would remove each other's files.

It is an flock, which the kernel lets go of when the process ends, however it ends; the file itself
stays and means nothing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class InUseError(RuntimeError):
    """Another process is running in the directory."""


class Lock:
    """Held from construction, which makes the directory, to `release`."""

    def __init__(self, directory: Path):
        """Raises InUseError, naming the process, when the lock is held already."""
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / ".lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise InUseError(
                f"{directory} is in use by another run (process {holder}). "
                "Wait for it to end, stop it, or choose another directory"
            ) from error
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()
