"""C++ beside a kernel, compiled on the machine that runs it and kept under ~/.cache for the next time.

    library(Path(__file__).with_suffix(".cc"))

A compiler is taken from CXX or found as c++, g++ or clang++. What it makes is for this processor; another
source, compiler, jaxlib or processor is another file. Processes that start together may each compile, and
one whole file remains.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

from research.compiled import directory

COMPILERS = "c++", "g++", "clang++"
# A static libstdc++, for an older one may be in the process already.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-static-libstdc++",
    "-w",
)


class BuildError(RuntimeError):
    """There is no compiler, it failed, or what it made cannot be kept or loaded."""


def library(source: Path) -> ctypes.CDLL:
    """The C++ file as a loaded library; BuildError with the reason when there is none."""
    compiler = find_compiler()
    version = _run([*compiler, "--version"])
    recipe = source.read_text(), compiler, version, FLAGS, jaxlib.__version__
    name = f"{source.stem}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}.so"
    try:
        target = directory("native") / name
        if target.exists():
            with contextlib.suppress(OSError):  # a file that something has damaged is made anew
                return ctypes.CDLL(str(target))
        _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError) as error:  # of Path.home() too
        raise BuildError(str(error)) from error


def find_compiler() -> list[str]:
    """Its command: CXX may hold arguments, or a wrapper and the compiler."""
    named = os.environ.get("CXX")
    for command in [shlex.split(named)] if named else [[name] for name in COMPILERS]:
        if command and shutil.which(command[0]):
            return command
    raise BuildError(
        f"no C++ compiler: looked for {f'CXX={named}' if named else ', '.join(COMPILERS)}"
    )


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        _run([*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(made)])
        made.replace(target)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        words = "\n".join(done.stderr.splitlines()[-20:])
        raise BuildError(f"`{shlex.join(command)}` ended with status {done.returncode}:\n{words}")
    return done.stdout
