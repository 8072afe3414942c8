"""Debian packages, without root: fetched by the machine's own apt-get, read in place.

A .deb is an `ar` archive; its files are in the member data.tar, compressed. deb(5).
"""

from __future__ import annotations

import getpass
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

MAGIC = b"!<arch>\n"
HEADER = 60


def download(name: str, version: str, folder: Path) -> subprocess.CompletedProcess:
    """Put the package's .deb into `folder`; apt-get's own check of its signature included.

    The system's lists of packages are tried first. Where they are missing or old, lists are fetched
    into `folder`, which needs no root. FileNotFoundError where there is no apt-get.
    """
    wanted = f"{name}={version}"
    done = _apt(folder, "download", wanted)
    if done.returncode == 0:
        return done
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    (folder / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    own = ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
    done = _apt(folder, *own, "update")
    return _apt(folder, *own, "download", wanted) if done.returncode == 0 else done


def _apt(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # No change of user: apt's own may not write to a private directory.
    command = ["apt-get", "-q", "-o", f"APT::Sandbox::User={getpass.getuser()}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def open_deb(path: Path) -> tarfile.TarFile:
    """The files of a .deb; their names begin with './'. tarfile.ReadError when it is not one."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise tarfile.ReadError(f"{path} is not a .deb: it does not begin with {MAGIC!r}")
        while header := file.read(HEADER):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                return tarfile.open(fileobj=io.BytesIO(file.read(size)))
            file.seek(size + size % 2, 1)
    raise tarfile.ReadError(f"{path} holds no data.tar")


def available() -> bool:
    """Whether this machine has an apt-get."""
    return shutil.which("apt-get") is not None
