"""Our own directories of few bits: safetensors, and a config.json that says what they mean.

Of a matrix NAME there are NAME.codes, NAME.scale and perhaps NAME.zero, or, doubly quantized,
NAME.scale.codes, NAME.scale.absmax and NAME.scale.offset instead of NAME.scale. config.json's
`quantization_config` describes each format in plain JSON, tables and formulas included, so that
nothing of ours is needed to rebuild the matrices: `ABOUT`, which is written there too.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from research.codes.packing import word_of
from research.codes.tables import table_of
from research.hub.checkpoint import CheckpointError
from research.hub.quantized_stack import described, has_zero
from research.hub.quantized_tensors import DTYPES, FLOATS, Matrix, Stored, named_arrays
from research.weights import double
from research.weights.formats import Codebook, Float8, Format, Integer
from research.weights.quantized import Quantized

METHOD = "packed_rows"
ABOUT = [
    "`tensors` gives the format of each matrix NAME; other tensors of the files are plain.",
    "NAME.codes holds bytes [rows, bytes]. Every `packing.bytes` bytes, read as one big-endian "
    "number, are `packing.codes` codes of `bits` bits, the first one in the highest bits.",
    "`value` is the number that a code stands for. `table` is indexed by the code; null is no "
    "finite number. `zero` is a constant, or 'tensor': NAME.zero, of the shape of the scales.",
    "NAME.scale is [rows, groups]: `group` neighbouring columns of a row share one. 'row': all "
    "columns of a row do. 'matrix': the scale is [1, 1] and everything shares it.",
    "Where `scale` is an object, scales are codes themselves: NAME.scale.codes [rows, groups], "
    "whose `block` codes, counted row by row through the matrix, share one of NAME.scale.absmax; "
    "NAME.scale.offset is one number.",
    "The rows are those of the tensor NAME, [out, in] in most models; where `transposed` is true, "
    "its columns.",
]


def describe(format: Format, transposed: bool) -> dict[str, Any]:
    """A format as plain JSON; ValueError for one that has no description."""
    size, count = word_of(format.bits)
    return {
        **_meaning(format),
        "bits": format.bits,
        "group": format.group,
        "packing": {"bytes": size, "codes": count},
        "scale": _scale(format),
        "transposed": transposed,
    }


def _meaning(format: Format) -> dict[str, Any]:
    if isinstance(format, Codebook):
        table = table_of(format.table).tolist()
        said = {"kind": "codebook", "name": format.table, "value": "table[code] * scale"}
        return said | {"table": table}
    if isinstance(format, Float8):
        floats = np.arange(256, dtype=np.uint8).view(format.dtype).astype(np.float32)
        table = [float(x) if np.isfinite(x) else None for x in floats]
        said = {"kind": "float8", "name": format.kind, "value": "table[code] * scale"}
        return said | {"table": table}
    if isinstance(format, Integer):
        minimum = format.zero_point == "minimum"
        value = "code * scale + zero" if minimum else "(code - zero) * scale"
        zero = "tensor" if has_zero(format) else format.middle
        return {"kind": "integer", "name": format.zero_point, "value": value, "zero": zero}
    raise ValueError(f"there is no description of the format {format}")


def _scale(format: Format) -> Any:
    if not format.double:
        return "tensor"
    table = table_of(double.TABLE).tolist()
    return {"value": "table[code] * absmax + offset", "table": table, "block": double.BLOCK}


def format_of(said: Any) -> tuple[Format, bool]:
    """(format, transposed) of a description; ValueError when it is none of `describe`."""
    try:
        kind, name, bits, group = (said[field] for field in ("kind", "name", "bits", "group"))
        twice = isinstance(said["scale"], dict)
        if kind == "codebook":
            format = Codebook(name, group, twice)
        elif kind == "float8":
            format = Float8(name, group, twice)
        elif kind == "integer":
            format = Integer(bits, group, name, twice)
        else:
            raise ValueError(f"kind = {kind!r} is not supported: codebook, integer or float8")
        ours = describe(format, said["transposed"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"lacks or mistypes a field ({error})") from error
    for field in sorted(ours.keys() | said.keys()):
        if ours.get(field) != said.get(field):
            raise ValueError(
                f"{field} = {said.get(field)!r} is not supported in a {kind} {name}, only "
                f"{ours.get(field)!r}"
            )
    return format, said["transposed"]


def matrices(files: Stored, description: dict[str, Any]) -> dict[str, Matrix]:
    """{name: matrix}; CheckpointError naming what in config.json or which tensor does not fit."""
    lists = [description.get(field) for field in ("formats", "tensors")]
    if not all(isinstance(each, dict) and each for each in lists):
        raise CheckpointError(
            f"{files.path}: quantization_config lacks the objects 'formats' and 'tensors'"
        )
    formats = {}
    for name, said in lists[0].items():
        try:
            formats[name] = format_of(said)
        except ValueError as error:
            raise CheckpointError(f"{files.path}: format {name!r}: {error}") from error
    found = {}
    for name, used in lists[1].items():
        if used not in formats:
            raise CheckpointError(f"{files.path}: {name} has the unknown format {used!r}")
        found[name] = _matrix(files, name, *formats[used])
    return found


def _matrix(files: Stored, name: str, format: Format, transposed: bool) -> Matrix:
    codes, octet = f"{name}.codes", DTYPES["U8"]
    files.dtype(codes, octet)
    if len(files.shapes[codes]) != 2:
        raise CheckpointError(
            f"{files.files[codes]}: {codes} has shape {list(files.shapes[codes])}; expected rows"
        )
    rows, held = files.shapes[codes]
    size, count = word_of(format.bits)
    scale = octet if format.double else files.dtype(f"{name}.scale", *FLOATS)
    zero = files.dtype(f"{name}.zero", octet, *FLOATS) if has_zero(format) else None
    try:
        if held % size:
            raise ValueError(f"words of {size} bytes do not fill rows of {held} bytes")
        kind = described((rows, held // size * count), format, scale, zero, transposed)
    except ValueError as error:
        raise CheckpointError(f"{files.files[codes]}: {codes}: {error}") from error
    arrays = named_arrays(name, kind)
    for part, leaf in arrays.items():
        why = f"for groups of {format.group!r}" if part != codes else ""
        files.require(part, leaf.shape, np.dtype(leaf.dtype), why=why)

    def read() -> Quantized:
        found = files.read(codes)
        if isinstance(format, Float8) and not np.isfinite(found.view(format.dtype)).all():
            raise CheckpointError(f"{files.files[codes]}: {codes} holds codes of nan or inf")
        parts = [found, *(files.finite(part) for part in list(arrays)[1:])]
        return jax.tree.unflatten(jax.tree.structure(kind), parts)

    shape = (rows, held // size * count)
    return Matrix(tuple(arrays), shape[::-1] if transposed else shape, kind, read)
