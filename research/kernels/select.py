"""Kernels by name, and the default that picks one from the device and the shapes alone.

The choice is made while tracing and depends on nothing but the device, whether there is a C++ compiler, shapes,
dtypes and what is asked for, so that it can be reported (`kernel_name`, `picked`) and never changes behind a
run's back. (So all hosts of a run need the compiler, or none may have it.) The thresholds were measured on a CPU with `scripts/bench_attention.py`; on a GPU `flash_decode`
was ahead of the plain form from a few thousand keys on, and even before (docs/FLASH_ATTENTION.md).
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp

from research.kernels.attend import Attend, reference
from research.kernels.blockwise import blockwise
from research.kernels.cudnn import cudnn
from research.kernels.flash1 import flash1
from research.kernels.flash2 import flash2
from research.kernels.flash_decode import FEW, MOST_ROWS, flash_decode
from research.kernels.mask import Mask
from research.kernels.native import native, unavailable
from research.kernels.operands import DTYPES, WIDEST
from research.kernels.sharded import on_ambient_mesh
from research.types import Array

# With fewer queries than this (decoding, above all) the scores are no larger than the keys, and the
# reference form is up to twice as fast. With fewer keys both take a fraction of a millisecond, and
# the reference form compiles sooner.
FEW_QUERIES = 16
FEW_KEYS = 64

log = logging.getLogger(__name__)
_picked: dict[str, tuple[str, ...]] = {}


def kernel_name(
    T: int,
    S: int,
    H: int = 64,
    dtype: Any = jnp.float32,
    group: int = 1,
    dropout: bool = False,
    backend: str | None = None,
    biased: bool = False,
) -> str:
    """The kernel `attend_auto` uses for T queries and S keys of H numbers, all of one dtype.

    `group` query heads share a key head. `backend` is JAX's default one when None: 'cpu', 'gpu' (CUDA of
    generation 8 or later) or another. `biased` scores have ALiBi or a soft cap. C++ suits a CPU, and where there
    is no compiler, or C++ lacks what is asked for, the loops of `blockwise`; the Pallas kernels suit a GPU;
    anything else takes 'reference'.
    """
    backend = backend or device_backend()
    if backend == "cpu":
        if T < FEW_QUERIES or S < FEW_KEYS:
            return "reference"
        return "blockwise" if dropout or biased or unavailable() else "native"
    if backend != "gpu" or not 16 <= H <= WIDEST or jnp.dtype(dtype) not in map(jnp.dtype, DTYPES):
        return "reference"
    if T > FEW or group * T > MOST_ROWS:
        return "flash2"
    return "reference" if dropout else "flash_decode"


def device_backend() -> str:
    """JAX's default backend, or 'other gpu' where Pallas' kernels cannot be expected to compile."""
    backend, device = jax.default_backend(), jax.devices()[0]
    if backend != "gpu":
        return backend
    capability = str(getattr(device, "compute_capability", "0"))  # of ROCm a name: 'gfx90a'
    modern = capability.replace(".", "").isdigit() and float(capability) >= 8
    return "gpu" if modern else "other gpu"


def attend_auto(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float | None = None,
    dropout: tuple[float, Array] | None = None,
    softcap: float | None = None,
) -> Array:
    """The contract of `research.kernels.attend`, by the kernel that suits the shapes."""
    (T, N, H), (S, K) = q.shape[1:], k.shape[1:3]
    dtype = q.dtype if q.dtype == k.dtype == v.dtype else None
    biased = mask.slopes is not None or softcap is not None
    name = kernel_name(T, S, H, dtype, max(1, N // K), dropout is not None, biased=biased)
    _say(name, f"{T} queries and {S} keys of {H} {q.dtype}")
    asked = {"dropout": dropout, "softcap": softcap}
    attend = KERNELS[name]
    if name != "reference":  # which XLA splits by itself
        attend = on_ambient_mesh(attend, q, k)
    return attend(q, k, v, mask, scale, **{a: x for a, x in asked.items() if x is not None})


def _say(name: str, shapes: str) -> None:
    if name not in _picked.get(shapes, ()):
        _picked[shapes] = (*_picked.get(shapes, ()), name)
        log.info("attention of %s: %s", shapes, name)


def picked() -> dict[str, str]:
    """Shapes -> the kernel that `attend_auto` took for them, of all that this process has traced."""
    return {shapes: ", ".join(names) for shapes, names in _picked.items()}


KERNELS: dict[str, Attend] = {
    "reference": reference,
    "blockwise": blockwise,
    "native": native,
    "flash1": flash1,
    "flash2": flash2,
    "flash_decode": flash_decode,
    "cudnn": cudnn,
    "auto": attend_auto,
}


def kernel(name: str) -> Attend:
    """The kernel called `name`; ValueError when there is none, never another in its place."""
    if name not in KERNELS:
        raise ValueError(f"no attention kernel {name!r}; there are {', '.join(sorted(KERNELS))}")
    return KERNELS[name]
