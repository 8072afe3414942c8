"""Double quantization: the scales of a matrix in 8 bits. Dettmers et al. 2023, QLoRA, section 3.

A scale for 64 weights costs 32 / 64 = 0.5 bit a weight. Their mean is taken off, and what is left has
8-bit codes in blocks of 256 with a scale of 32 bits each: 8 / 64 + 32 / (64 * 256) = 0.127.

The mean's order of additions and the way codes are found are those of bitsandbytes on a CPU, so that
all parts have its bits. Scales that differ from the mean by less than 3e-5 of a block's largest
difference get a code that is off by as much.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

from research.codes import blocks
from research.codes.mean import mean
from research.codes.steps import nearest_step
from research.types import Array

BLOCK = 256
TABLE = "DYNAMIC"


@struct.dataclass
class DoubleQuantized:
    """codes uint8 [..., rows, groups], absmax [..., blocks] and offset [...]: scales [..., rows, groups].

    Blocks run through the rows of one matrix, one after another.
    """

    codes: Array
    absmax: Array
    offset: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def values(self) -> Array:
        flat = self.codes.reshape(*self.codes.shape[:-2], -1)
        largest = jnp.repeat(self.absmax, BLOCK, axis=-1)[..., : flat.shape[-1]]
        decoded = blocks.decode(flat, self.absmax, TABLE, BLOCK)
        # Changes no number, but keeps a compiler from rounding product and sum as one.
        decoded = jnp.clip(decoded, -largest, largest) + self.offset[..., None]
        return decoded.reshape(self.codes.shape)


def quantize(scale: Array) -> DoubleQuantized:
    """Scales [..., rows, groups], their mean over a whole matrix taken off first."""
    flat = scale.reshape(*scale.shape[:-2], -1)
    offset = mean(flat)
    codes, absmax = blocks.encode(flat - offset[..., None], TABLE, BLOCK, nearest_step)
    empty = jnp.repeat(absmax == 0, BLOCK, axis=-1)[..., : flat.shape[-1]]
    codes = jnp.where(empty, 0, codes)  # times 0 any code is 0, and bitsandbytes takes the first
    return DoubleQuantized(codes.reshape(scale.shape), absmax, offset)


def scales(scale: Any) -> Array:
    """[..., rows, groups], however they are kept."""
    return scale.values() if isinstance(scale, DoubleQuantized) else jnp.asarray(scale)
