"""Tile sizes of the Pallas kernels by device and head size.

They are chosen among the ones that keep every number in registers: `scripts/aot.sh` compiles the
kernels for H100 and A100 without having one, and docs/flash_resources.jsonl holds registers, spilled
bytes and shared memory of each. Tensor cores of an H100 want 64 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from research.kernels.triton import Tile


@dataclass(frozen=True)
class FlashTiles:
    """The tile of each kernel of FlashAttention-2: forward, dq, and dk with dv."""

    forward: Tile
    queries: Tile
    keys: Tile


# By generation and the padded head size, for 16-bit inputs.
TABLE: dict[tuple[str, int], FlashTiles] = {
    ("h100", 64): FlashTiles(Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("h100", 128): FlashTiles(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    ("h100", 256): FlashTiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("a100", 64): FlashTiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    ("a100", 128): FlashTiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    ("a100", 256): FlashTiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}
# Float32 is for checks: its products do not round to fewer bits, and so do not run on tensor cores.
WIDE = Tile(32, 32, 8, 1)
FLOAT32 = {
    64: FlashTiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    128: FlashTiles(Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), WIDE),
    256: FlashTiles(WIDE, WIDE, WIDE),
}


def generation(device_kind: str) -> str:
    """'h100' for Hopper and later, as JAX names devices, and 'a100' for anything else."""
    return "h100" if any(name in device_kind for name in ("H100", "H200", "B200")) else "a100"


def flash_tiles(H: int, dtype: Any, device_kind: str | None = None) -> FlashTiles:
    """The default for heads of H numbers on a device: the one here when None."""
    width = 64 if H <= 64 else 128 if H <= 128 else 256
    if jnp.dtype(dtype) == jnp.float32:
        return FLOAT32[width]
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    return TABLE[generation(kind), width]
