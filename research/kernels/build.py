"""C++ beside a kernel, compiled on the machine that runs it and kept under ~/.cache for the next time.

    library(Path(__file__).with_suffix(".cc"))

A compiler is taken from CXX or found as c++, g++ or clang++. What it makes is for this processor; another
source, compiler or processor is another file. Processes that start together may each compile, and one
whole file remains.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from research.compiled import directory

COMPILERS = "c++", "g++", "clang++"
FLAGS = "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w"


class BuildError(RuntimeError):
    """There is no compiler, or it failed."""


def library(source: Path) -> ctypes.CDLL:
    """The C++ file as a loaded library; BuildError with the compiler's words when there is none."""
    compiler = find_compiler()
    version = _run([compiler, "--version"])
    recipe = "".join((source.read_text(), compiler, version, *FLAGS)).encode()
    target = directory("native") / f"{source.stem}-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
    if not target.exists():
        _compile(compiler, source, target)
    return ctypes.CDLL(str(target))


def find_compiler() -> str:
    named = os.environ.get("CXX")
    found = filter(None, map(shutil.which, (named,) if named else COMPILERS))
    try:
        return next(found)
    except StopIteration:
        wanted = f"CXX={named}" if named else ", ".join(COMPILERS)
        raise BuildError(f"no C++ compiler: looked for {wanted}") from None


def _compile(compiler: str, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        _run([compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(made)])
        made.replace(target)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = "\n".join(done.stderr.splitlines()[-20:])
        raise BuildError(f"`{' '.join(command)}` ended with status {done.returncode}:\n{words}")
    return done.stdout
