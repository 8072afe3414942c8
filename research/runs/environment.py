"""What a run ran on: the commit, the lock, the versions, the device, and the memory it took."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
LIBRARIES = ("jax", "jaxlib", "flax", "optax")

# Rows are appended while a sweep runs: they do not make the code that runs another one.
_NOT_CODE = (":!experiments/results", ":!experiments/LOG.md")


def commit(root: Path = ROOT) -> dict[str, Any]:
    """{'commit', 'dirty'} of the work tree; both None where there is no git repository.

    Dirty means that tracked files differ from the commit or that untracked ones exist, results
    and the log apart.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain", "--", ".", *_NOT_CODE)
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def lock_sha256(path: Path = ROOT / "requirements.txt") -> str:
    """sha256 of the file that pins the environment."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **found}


def device() -> dict[str, Any]:
    """The accelerator as JAX names it, and the processor and cores beside it."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
        "cpu": cpu_model(),
        "cores": _cores(),
    }


def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    """'Intel(R) Xeon(R) ...' where the system says so, else the architecture."""
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def reset_peak_memory() -> None:
    """Starts a new peak for `peak_memory`, where the kernel can do that (Linux)."""
    # On another system the peak is that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident memory in bytes since the last reset, or since the process began."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
