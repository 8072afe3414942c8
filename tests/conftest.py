"""Tests run on the CPU with eight virtual devices, so that meshes can be tested anywhere.

Three quarters of their time is compilation. So XLA optimises little here, and what it compiled is
kept between runs, in a directory for this processor and these versions: code for another could be
executed, and crash. Processes that tests start inherit both.
"""

import gc
import hashlib
import os
import platform
from pathlib import Path


def compiled_directory() -> Path:
    """Where compiled functions are kept: beside the packages' cache, a directory a machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    pins = (Path(__file__).parents[1] / "requirements.txt").read_text()
    name = hashlib.sha256(f"{platform.machine()}{processor}{pins}".encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "llm-research-jax" / "compiled-tests" / name


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled_directory()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def key():
    return jax.random.key(0)


# Linux gives a process 65,530 memory maps (vm.max_map_count); a compiled function takes about 15,
# and the compiler dies of a segmentation fault when there is none left.
MOST_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def compiled_functions_are_dropped():
    """After a file whose worker holds many of them."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
