"""Tensors of few bits on their way into a parameter tree.

A `Checkpoint` says of such tensors what they are (`coded`): a `Quantized` of shapes, whose rows are
the tensor's rows, or, where `transposed`, its columns; or why they have to be read dense. The layers
of a stack are one array, so they stay in few bits if all have one format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.codes.packing import word_of
from research.hub.checkpoint import Checkpoint
from research.weights.double import BLOCK, DoubleQuantized
from research.weights.formats import Format
from research.weights.quantized import Quantized


def described(
    shape: tuple[int, ...],
    format: Format,
    scale_dtype: Any = np.float32,
    zero_dtype: Any = None,
    transposed: bool = False,
) -> Quantized:
    """The `Quantized` of shapes for rows [rows, columns]; zeros like scales unless `zero_dtype`.

    ValueError when groups do not fill the columns, or codes whole bytes.
    """
    rows, columns = shape
    size, count = word_of(format.bits)
    if columns % count:
        raise ValueError(f"{count} codes of {format.bits} bits do not divide rows of {columns}")
    scales = scale_shape(rows, columns, format.group)
    scale: Any = jax.ShapeDtypeStruct(scales, scale_dtype)
    zero = scale.update(dtype=zero_dtype or scale_dtype) if has_zero(format) else None
    if format.double:
        absmax = -(-scales[0] * scales[1] // BLOCK)
        scale = DoubleQuantized(
            scale.update(dtype=np.uint8),
            jax.ShapeDtypeStruct((absmax,), np.float32),
            jax.ShapeDtypeStruct((), np.float32),
        )
    codes = jax.ShapeDtypeStruct((rows, columns // count * size), np.uint8)
    return Quantized(codes, scale, zero, format, transposed)


def has_zero(format: Format) -> bool:
    """Whether each group has a number of its own besides its scale."""
    return getattr(format, "zero_point", "middle") != "middle"


def scale_shape(rows: int, columns: int, group: int | str) -> tuple[int, int]:
    if group == "matrix":
        return 1, 1
    size = columns if group == "row" else group
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"a group is a number of columns, 'row' or 'matrix', not {group!r}")
    if columns % size:
        raise ValueError(f"groups of {size} do not fill rows of {columns}")
    return rows, columns // size


def stacked(path: str, tensors: Sequence[tuple[str, Any]], checkpoint: Checkpoint) -> Any:
    """The `Quantized` at `path`, from its layers' tensors [(name, Part)]; None when it is dense.

    A line is printed where some tensor is in few bits and the leaf is not.
    """
    kinds = {name: checkpoint.coded.get(name) for name, _ in tensors}
    if not any(kinds.values()):
        return None
    if (why := reason(kinds, tensors)) is not None:
        print(f"{path} is loaded dense: {why}", flush=True)
        return None
    entry = tensors[0][1].entry
    layers = [checkpoint.read_coded(name) for name, _ in tensors]
    if entry.stacked:
        whole = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)
    else:
        whole = jax.tree.map(jnp.asarray, layers[0])
    return whole.replace(transposed=whole.transposed != entry.transpose)


def reason(kinds: dict[str, Any], tensors: Sequence[tuple[str, Any]]) -> str | None:
    """Why tensors of these kinds cannot be one `Quantized`; None when they can."""
    (first, kind), *rest = kinds.items()
    if tensors[0][1].entry.columns is not None:
        return f"{first} holds other matrices too"
    for name, other in [(first, kind), *rest]:
        if not isinstance(other, Quantized):
            return f"{name}: {other or 'is not quantized'}"
        if jax.tree.structure(other) != jax.tree.structure(kind) or other != kind:
            return f"{name} is {other.format}, {first} is {kind.format}"
    return None
