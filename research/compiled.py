"""Compiled functions are kept between processes: the second start of a program compiles nothing.

    keep_compiled()            # once, before anything is compiled

They are under ~/.cache/llm-research-jax/compiled, in a folder for this processor and these versions:
code for another could be executed, and crash. JAX's own variables decide: JAX_ENABLE_COMPILATION_CACHE=0
turns it off, JAX_COMPILATION_CACHE_DIR names another place. What was kept is the machine code itself, so
that no number depends on whether it was.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

ROOT = Path(__file__).parents[1]


def directory(kind: str = "compiled") -> Path:
    """Where compiled functions of this processor and these versions are kept, beside the packages' cache."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    pins = (ROOT / "requirements.txt").read_text()
    name = hashlib.sha256(f"{platform.machine()}{processor}{pins}".encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "llm-research-jax" / kind / name


def keep_compiled() -> Path | None:
    """Where they are kept from here on; None when that is turned off. A place that was chosen stays."""
    import jax  # late: `directory` is asked for before JAX may be imported (tests/compiling.py)

    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory()))
    return Path(jax.config.jax_compilation_cache_dir)
