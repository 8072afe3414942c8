"""The one place where kernels meet what runs them: Pallas' Triton route of jax 0.10.

A kernel is a Python function over references, written with `online` and the few names here; what is
specific to Triton is `launch` (warps, stages, the compiler's parameters) and `barrier`. Later
releases of JAX remove this route in favour of Mosaic GPU: docs/FLASH_ATTENTION.md says what moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from research.types import Array

Block = pl.BlockSpec
program = pl.program_id


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut: queries and keys of a tile, warps of a program, stages of its loads."""

    query: int
    key: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        for name in ("query", "key", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} of a tile must be a power of 2, not {value}")
        if min(self.query, self.key) < 16:
            raise ValueError(f"tensor cores need tiles of 16 at least, not {self.query}x{self.key}")


def launch(
    kernel: Callable,
    name: str,
    grid: tuple[int, ...],
    inputs: Any,
    outputs: Any,
    tile: Tile,
    interpret: bool,
) -> Callable:
    """A function of the operands. `inputs`: trees of Block; `outputs`: trees of (shape, dtype, Block)."""
    is_output = lambda x: isinstance(x, tuple) and isinstance(x[-1], Block)  # noqa: E731
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(*x[:2]), outputs, is_leaf=is_output)
    specs = jax.tree.map(lambda x: x[2], outputs, is_leaf=is_output)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=inputs,
        out_specs=specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )


def piece(block: Array, size: int) -> Any:
    """The slice of the block-th `size` entries of an axis."""
    return pl.ds(block * size, size)


def span(start: Array, size: int) -> Any:
    """The slice of `size` entries from `start`."""
    return pl.ds(start, size)


def rows(ref: Any, block: Array, size: int) -> Array:
    """The block-th `size` rows of a reference."""
    return ref[piece(block, size)]


def barrier(interpret: bool) -> None:
    """What the program's threads wrote to memory is there for all of them. One thread interprets."""
    if not interpret:
        triton.debug_barrier()


def divide(n: Array, by: int) -> Array:
    """n // by for n >= 0, without the checks of signs that Python's `//` would bring."""
    return n if by == 1 else lax.div(n, jnp.asarray(by, n.dtype))


def require(interpret: bool | None, name: str) -> bool:
    """`interpret`, or False where there is a GPU; ValueError on another device.

    False on a machine without one is for lowering and compiling only.
    """
    if interpret is None and jax.default_backend() != "gpu":
        raise ValueError(
            f"the kernel {name!r} runs on a GPU, and this is a {jax.default_backend()}: choose "
            f"'auto', 'blockwise' or 'reference', or pass interpret=True to see it interpreted"
        )
    return bool(interpret)
