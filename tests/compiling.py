"""How tests compile: three quarters of their time is compilation.

XLA optimises little, and what it compiled is kept between runs, apart from what programs keep
(`research.compiled`). Processes that tests start inherit both. Nothing here imports JAX.
"""

from research.compiled import directory

# Environment variables, which give way to those that are set.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_COMPILATION_CACHE_DIR": str(directory("compiled-tests")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
