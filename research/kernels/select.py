"""Kernels by name, and the default that picks one from the backend and the shapes alone.

The choice is made while tracing and depends on nothing but the backend, T and S, so that it can be
reported (`kernel_name`) and never changes behind a run's back. The thresholds were measured on a
CPU with `scripts/bench_attention.py`.
"""

from __future__ import annotations

import jax

from research.kernels.attend import Attend, reference
from research.kernels.blockwise import blockwise
from research.kernels.mask import Mask
from research.types import Array

# With fewer queries than this (decoding, above all) the scores are no larger than the keys, and the
# reference form is up to twice as fast. With fewer keys both take a fraction of a millisecond, and
# the reference form compiles sooner.
FEW_QUERIES = 16
FEW_KEYS = 64


def kernel_name(T: int, S: int, backend: str | None = None, dropout: bool = False) -> str:
    """The kernel `attend_auto` uses for T queries and S keys: 'reference' or 'blockwise'.

    `backend` is JAX's default one when None. The loops of `blockwise` suit a CPU only; of
    attention probabilities only `reference` can drop some.
    """
    small = T < FEW_QUERIES or S < FEW_KEYS
    plain = small or dropout or (backend or jax.default_backend()) != "cpu"
    return "reference" if plain else "blockwise"


def attend_auto(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float | None = None,
    dropout: tuple[float, Array] | None = None,
) -> Array:
    """The contract of `research.kernels.attend`, by the kernel that suits the shapes."""
    if dropout is not None:
        return reference(q, k, v, mask, scale, dropout)
    return KERNELS[kernel_name(q.shape[1], k.shape[1])](q, k, v, mask, scale)


KERNELS: dict[str, Attend] = {"reference": reference, "blockwise": blockwise, "auto": attend_auto}


def kernel(name: str) -> Attend:
    """The kernel called `name`; ValueError when there is none, never another in its place."""
    if name not in KERNELS:
        raise ValueError(f"no attention kernel {name!r}; there are {', '.join(sorted(KERNELS))}")
    return KERNELS[name]
