"""How tests compile: three quarters of their time is compilation.

XLA optimises little, and what it compiled is kept between runs, in a directory for this processor and
these versions: code for another could be executed, and crash. Processes that tests start inherit both.
"""

import hashlib
import platform
from pathlib import Path


def directory() -> Path:
    """Where compiled functions are kept: beside the packages' cache."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    pins = (Path(__file__).parents[1] / "requirements.txt").read_text()
    name = hashlib.sha256(f"{platform.machine()}{processor}{pins}".encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "llm-research-jax" / "compiled-tests" / name


# Environment variables, which give way to those that are set.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_COMPILATION_CACHE_DIR": str(directory()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
