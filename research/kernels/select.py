"""Kernels by name, and the default that picks one from the device and the shapes alone.

The choice is made while tracing and depends on nothing but the backend, shapes and dtype, so that it
can be reported (`kernel_name`, `picked`) and never changes behind a run's back. The thresholds were
measured on a CPU with `scripts/bench_attention.py`; those of a GPU are unmeasured.
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
from research.kernels.flash_decode import FEW, flash_decode
from research.kernels.mask import Mask
from research.kernels.operands import DTYPES, WIDEST
from research.types import Array

# With fewer queries than this (decoding, above all) the scores are no larger than the keys, and the
# reference form is up to twice as fast. With fewer keys both take a fraction of a millisecond, and
# the reference form compiles sooner.
FEW_QUERIES = 16
FEW_KEYS = 64

log = logging.getLogger(__name__)
_picked: dict[str, str] = {}


def kernel_name(
    T: int, S: int, H: int = 64, dtype: Any = jnp.float32, backend: str | None = None
) -> str:
    """The kernel `attend_auto` uses for T queries and S keys of H numbers.

    `backend` is JAX's default one when None. The loops of `blockwise` suit a CPU, the Pallas kernels
    a GPU; anything else takes 'reference'. 'flash_decode' has no gradients and no dropout:
    `attend_auto` takes it only on a cache, which is where a mask has an offset.
    """
    backend = backend or jax.default_backend()
    if backend == "cpu":
        return "reference" if T < FEW_QUERIES or S < FEW_KEYS else "blockwise"
    if backend != "gpu" or not 16 <= H <= WIDEST or jnp.dtype(dtype) not in map(jnp.dtype, DTYPES):
        return "reference"
    return "flash2" if T > FEW else "flash_decode"


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
    (T, H), S = (q.shape[1], q.shape[3]), k.shape[1]
    name = kernel_name(T, S, H, q.dtype)
    trains = dropout is not None or (isinstance(mask.offset, int) and mask.offset == 0)
    if name == "flash_decode" and trains:
        name = "reference"
    _say(name, f"{T} queries and {S} keys of {H} {q.dtype}")
    more = {} if dropout is None else {"dropout": dropout}
    return KERNELS[name](q, k, v, mask, scale, softcap=softcap, **more)


def _say(name: str, shapes: str) -> None:
    if shapes not in _picked:
        _picked[shapes] = name
        log.info("attention of %s: %s", shapes, name)


def picked() -> dict[str, str]:
    """Shapes -> the kernel that `attend_auto` took for them, of all that this process has traced."""
    return dict(_picked)


KERNELS: dict[str, Attend] = {
    "reference": reference,
    "blockwise": blockwise,
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
