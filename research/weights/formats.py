"""How the numbers of a matrix become small codes: integers, 4-bit tables, 8-bit floats.

A format works on rows [..., rows, columns] and gives three functions that invert each other up to
rounding, so that an algorithm (GPTQ, a search for clipping) can replace one of them:

    scale, zero = format.scales(rows)         # [..., rows or 1, groups] float32; zero may be None
    codes = format.round(rows, scale, zero)   # [..., rows, columns] uint8, not packed
    values = format.values(codes, scale, zero)

`group` columns of a row share a scale; "row" takes a whole row (a channel), "matrix" all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from research.codes.blocks import SMALLEST
from research.codes.packing import fields, join, word_of
from research.codes.tables import choose, nearest, table_of
from research.types import Array

Group = int | str


def grouped(rows: Array, group: Group) -> Array:
    """[..., rows, columns] -> [..., rows or 1, groups, columns of a group].

    ValueError when the groups do not fill the rows: nothing is padded.
    """
    if group == "matrix":
        return rows.reshape(*rows.shape[:-2], 1, 1, -1)
    size = rows.shape[-1] if group == "row" else group
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"a group is a number of columns, 'row' or 'matrix', not {group!r}")
    if rows.shape[-1] % size:
        raise ValueError(f"groups of {size} do not fill {rows.shape[-1]} columns")
    return rows.reshape(*rows.shape[:-1], -1, size)


def spread(scale: Array, columns: int) -> Array:
    """[..., rows or 1, groups] -> [..., rows or 1, columns]: each column's own scale."""
    return jnp.repeat(scale, columns // scale.shape[-1], axis=-1)


@dataclass(frozen=True)
class Codebook:
    """Entries of a table of 16 times the largest magnitude of a group. QLoRA (arXiv:2305.14314).

    `double` keeps the scales in 8 bits (`weights.double`).
    """

    table: str = "NF4"
    group: Group = 64
    double: bool = False
    bits = 4

    def __post_init__(self):
        if len(table_of(self.table)) != 2**self.bits:
            raise ValueError(f"a codebook has 16 entries, {self.table} has not")

    def scales(self, rows: Array) -> tuple[Array, None]:
        return jnp.abs(grouped(rows, self.group)).max(axis=-1), None

    def round(self, rows: Array, scale: Array, zero: None) -> Array:
        inverse = 1.0 / jnp.maximum(scale, SMALLEST)
        return nearest(jnp.clip(rows * spread(inverse, rows.shape[-1]), -1, 1), self.table)

    def values(self, codes: Array, scale: Array, zero: None) -> Array:
        columns = codes.shape[-1]
        entries = [spread(entry * scale, columns) for entry in table_of(self.table)]
        return choose(codes, [jnp.broadcast_to(entry, codes.shape) for entry in entries])


@dataclass(frozen=True)
class Integer:
    """scale * (code - zero), the codes 0 .. 2^bits - 1.

    zero_point "middle": zero is 2^(bits - 1) everywhere, the largest magnitude of a group has the
    last code, and the first is not used (symmetric). "integer": a zero of its own for each group,
    whose least and largest number, and 0, have codes (asymmetric). "minimum": scale * code + zero, so
    that the least and largest number are exact, and 0 need not be.
    """

    bits: int = 4
    group: Group = 64
    zero_point: str = "middle"
    double: bool = False

    def __post_init__(self):
        word_of(self.bits)
        if self.zero_point not in ("middle", "integer", "minimum"):
            raise ValueError(
                f"zero_point is 'middle', 'integer' or 'minimum', not {self.zero_point!r}"
            )

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    def scales(self, rows: Array) -> tuple[Array, Array | None]:
        cut = grouped(rows, self.group)
        return self.from_range(cut.min(axis=-1), cut.max(axis=-1))

    def from_range(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """(scale, zero) of groups whose numbers lie between `low` and `high`."""
        if self.zero_point == "middle":
            return jnp.maximum(jnp.abs(low), jnp.abs(high)) / (self.middle - 1), None
        if self.zero_point == "minimum":
            return (high - low) / (2**self.bits - 1), low
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        scale = (high - low) / (2**self.bits - 1)
        return scale, jnp.round(-low / _nonzero(scale)).astype(jnp.uint8)

    def round(self, rows: Array, scale: Array, zero: Array | None) -> Array:
        scale = spread(_nonzero(scale), rows.shape[-1])
        if zero is None:
            steps = jnp.clip(jnp.round(rows / scale), 1 - self.middle, self.middle - 1)
            return (steps + self.middle).astype(jnp.uint8)
        zero = spread(zero, rows.shape[-1]).astype(jnp.float32)
        if self.zero_point == "minimum":
            steps = jnp.round((rows - zero) / scale)
        else:
            steps = jnp.round(rows / scale) + zero
        return jnp.clip(steps, 0, 2**self.bits - 1).astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Array | None) -> Array:
        scale, codes = spread(scale, codes.shape[-1]), codes.astype(jnp.float32)
        if zero is None:
            return (codes - self.middle) * scale
        zero = spread(zero, codes.shape[-1]).astype(jnp.float32)
        return codes * scale + zero if self.zero_point == "minimum" else (codes - zero) * scale


@dataclass(frozen=True)
class Float8:
    """8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433), the largest number at their largest.

    kind: "e4m3" (4 bits of exponent, 3 of fraction, up to 448) or "e5m2" (up to 57,344).
    """

    kind: str = "e4m3"
    group: Group = "row"
    double: bool = False
    bits = 8

    def __post_init__(self):
        if self.kind not in ("e4m3", "e5m2"):
            raise ValueError(f"kind is 'e4m3' or 'e5m2', not {self.kind!r}")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float8_e4m3fn if self.kind == "e4m3" else jnp.float8_e5m2)

    def scales(self, rows: Array) -> tuple[Array, None]:
        largest = float(jnp.finfo(self.dtype).max)
        return jnp.abs(grouped(rows, self.group)).max(axis=-1) / largest, None

    def round(self, rows: Array, scale: Array, zero: None) -> Array:
        # A number past the largest is the largest, not nan: a scale need not be the rows' own.
        largest = float(jnp.finfo(self.dtype).max)
        scaled = jnp.clip(rows / spread(_nonzero(scale), rows.shape[-1]), -largest, largest)
        return jax.lax.bitcast_convert_type(scaled.astype(self.dtype), jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: None) -> Array:
        floats = jax.lax.bitcast_convert_type(codes, self.dtype).astype(jnp.float32)
        return floats * spread(scale, codes.shape[-1])


Format = Codebook | Integer | Float8


def rounded(rows: Array, format: Format) -> Array:
    """Rows [..., rows, columns] as float32 after rounding; the scales are not double quantized."""
    rows = rows.astype(jnp.float32)
    scale, zero = format.scales(rows)
    return format.values(format.round(rows, scale, zero), scale, zero)


def decoded(packed: Array, scale: Array, zero: Array | None, format: Format) -> Array:
    """`format.values` of packed codes [..., rows, bytes], float32 [..., rows, columns].

    Each group is a row of its own, and the codes at each place of a byte become numbers before they
    stand in order: XLA's CPU loops put bytes in order one at a time, which takes longer than the rest.
    """
    parts, scale = fields(packed, format.bits), scale.astype(jnp.float32)
    *rows, words = parts[0].shape
    if words % scale.shape[-1]:  # a word has codes of two groups
        return format.values(join(parts), scale, zero)
    scale, zero = scale[..., None], None if zero is None else zero[..., None]
    cut = [part.reshape(*rows, scale.shape[-2], -1) for part in parts]
    return join([format.values(part, scale, zero) for part in cut]).reshape(*rows, -1)


def _nonzero(scale: Array) -> Array:
    """A group of zeros has scale 0, and its codes are those of 0 whatever it is divided by."""
    return jnp.where(scale == 0, 1, scale)
