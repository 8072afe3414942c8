"""Tests run on the CPU with eight virtual devices, so that meshes can be tested anywhere."""

import gc
import os
from pathlib import Path

from compiling import SETTINGS

os.environ.update(SETTINGS | os.environ)

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
