"""What a Pallas attention kernel computes and moves, counted from its own program.

`count` traces a call with its gradient, finds the kernels in it, and walks each one's program: a product
counts its FLOPs, reading or writing a reference its bytes, as often as the grid, the loops and the table
of tiles have it done. No formula about attention is in here; change a loop and the numbers change.

What programs read and write goes over the chip's own wires. How much of it comes from the GPU's memory
depends on its cache, so there are two bounds: `moved`, where nothing is found in a cache, which is what
Theorem 2 of FlashAttention counts (Dao et al. 2022, arXiv:2205.14135: Θ(T²H²/M) numbers with M on chip,
against Θ(TH + T²) of the plain form), and `arrays`, each operand and result once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from research.kernels.attend import Attend
from research.kernels.flash_tiles import FlashTiles
from research.kernels.mask import Mask
from research.kernels.operands import fitting
from research.kernels.tiles import Tiles, visit_table

# Kernel -> (whose tile it has, the axis along which its table lists blocks).
TABLES = {
    "flash2_forward": ("forward", 2),
    "flash2_queries": ("queries", 2),
    "flash2_keys": ("keys", 1),
    "flash1_forward": ("forward", 1),
    "flash1_backward": ("forward", 1),
}
LOOPS = {"scan": "jaxpr", "while": "body_jaxpr"}


@dataclass(frozen=True)
class Cost:
    """FLOPs (a multiplication and an addition are two), bytes moved by programs, bytes of the arrays."""

    flops: float = 0.0
    moved: float = 0.0
    arrays: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.moved + other.moved, self.arrays + other.arrays)

    def times(self, n: float) -> Cost:
        return Cost(self.flops * n, self.moved * n, self.arrays * n)


@dataclass(frozen=True)
class Shape:
    """Sizes of a call, as `research.kernels.attend` names them."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: Any = jnp.bfloat16

    def operands(self) -> list[jax.ShapeDtypeStruct]:
        queries, keys = (self.B, self.T, self.N, self.H), (self.B, self.S, self.K, self.H)
        return [jax.ShapeDtypeStruct(x, self.dtype) for x in (queries, keys, keys)]


def count(attend: Attend, shape: Shape, mask: Mask, tiles: FlashTiles) -> dict[str, Cost]:
    """{kernel: Cost} of `flash1` or `flash2`, forward and backward."""

    def loss(q, k, v):
        out = attend(q, k, v, mask, tiles=tiles, interpret=False)
        return out.astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*shape.operands())
    return {
        eqn.params["name"]: _cost(eqn, visits(eqn.params["name"], shape, mask, tiles))
        for eqn in _launches(program.jaxpr)
    }


def visits(name: str, shape: Shape, mask: Mask, tiles: FlashTiles) -> tuple[float, float]:
    """How many (full, partial) tiles a row of the kernel's table has, on average."""
    which, axis = TABLES[name]
    tile = getattr(tiles, which)
    tile = Tiles(fitting(shape.T, tile.query), fitting(shape.S, tile.key))
    table = visit_table(mask, shape.T, shape.S, tile, axis)
    return tuple(np.asarray(table[..., 0]).mean((0, 1)).tolist())


def plain(shape: Shape, backward: bool = True) -> Cost:
    """The plain form, whose scores and probabilities [B, N, T, S] go to memory and come back.

    Forward: S is written and read, P written and read. Backward, with P kept: dP is written and read,
    P read for dS and for dV, dS written and read twice.
    """
    size = jnp.dtype(shape.dtype).itemsize
    square = shape.B * shape.N * shape.T * shape.S
    rows = 2 * sum(prod(x.shape) for x in shape.operands()[:2])  # q, out; k, v
    cost = Cost(4.0 * square * shape.H, (4 * square + rows) * size, (4 * square + rows) * size)
    if not backward:
        return cost
    moved = (7 * square + 2 * rows) * size
    return cost + Cost(8.0 * square * shape.H, moved, moved)


def _launches(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from _launches(inner)


def _cost(eqn: Any, tiles: tuple[float, float]) -> Cost:
    programs = prod(eqn.params["grid_mapping"].grid)
    arrays = sum(_bytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
    return _body(eqn.params["jaxpr"], tiles).times(programs) + Cost(arrays=arrays)


def _body(jaxpr: Any, tiles: tuple[float, float]) -> Cost:
    """One run of a kernel's code. Its loops over tiles are the `while` ones, full tiles first."""
    total, walks = Cost(), iter(tiles)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in LOOPS:
            rounds = eqn.params["length"] if name == "scan" else next(walks)
            total += _body(eqn.params[LOOPS[name]].jaxpr, tiles).times(rounds)
        elif name == "dot_general":
            total += Cost(flops=_product_flops(eqn))
        elif name in ("get", "swap"):
            total += Cost(moved=_bytes(eqn.outvars[0].aval))
    return total


def _product_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * prod(eqn.outvars[0].aval.shape) * prod(left[i] for i in contracted)


def _bytes(aval: Any) -> int:
    return prod(aval.shape) * aval.dtype.itemsize
