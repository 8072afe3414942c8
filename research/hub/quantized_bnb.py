"""Directories that transformers saved with bitsandbytes: 4 bits (NF4, FP4) and LLM.int8.

4 bits, QLoRA (arXiv:2305.14314). The matrix [out, in] is cut row by row into blocks that share a
scale, and codes lie two to a byte, the first one high, as ours do. Of NAME there are
    NAME                                  uint8 [out * in / 2, 1]
    NAME.absmax                           [blocks], float, or uint8 codes of the map below
    NAME.quant_map                        what the 16 codes mean
    NAME.quant_state.bitsandbytes__KIND   JSON in uint8: kind, size of a block, shape, nested offset
    NAME.nested_absmax, .nested_quant_map of doubly quantized scales, in blocks of 256
Blocks that do not fill rows run on from one row to the next. Our groups end with their rows, so that
such a matrix is read dense.

8 bits, LLM.int8 (arXiv:2208.07339). NAME is int8 [out, in], and SCB beside it the largest magnitude
of each row: a weight is code * SCB / 127. What the library does with outliers of the inputs when it
multiplies is no part of the file, and not done here.

The library rounds a dense matrix to the dtype that the model was loaded in; ours is float32.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

from research.codes import tables
from research.hub.checkpoint import CheckpointError
from research.hub.quantized_stack import described
from research.hub.quantized_tensors import DTYPES, FLOATS, Matrix, Stored
from research.weights import double
from research.weights.formats import Codebook, Integer
from research.weights.quantized import Quantized

STATE = ".quant_state.bitsandbytes__"
KINDS = {"nf4": "NF4", "fp4": "FP4"}
OCTET = DTYPES["U8"]


def matrices(files: Stored, description: dict[str, Any]) -> dict[str, Matrix]:
    """{name: matrix}; CheckpointError naming the tensor that is missing or does not fit."""
    eight = bool(description.get("load_in_8bit"))
    if eight == bool(description.get("load_in_4bit")):
        raise CheckpointError(
            f"{files.path}: bitsandbytes saves load_in_4bit or load_in_8bit = true, one of them"
        )
    storage = description.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise CheckpointError(
            f"{files.path}: bnb_4bit_quant_storage = {storage!r} is not supported, only 'uint8'"
        )
    if eight:
        names = [name for name, dtype in files.dtypes.items() if dtype == "I8"]
        found = {name: eight_bits(files, name) for name in names}
    else:
        names = [name for name in files.shapes if name.endswith(".weight")]
        names = [name for name in names if files.dtypes[name] == "U8"]
        found = {name: four_bits(files, name) for name in names}
    if not found:
        raise CheckpointError(f"{files.path}: config.json says quantized, and no tensor is")
    return found


def eight_bits(files: Stored, name: str) -> Matrix:
    """The matrix `name`, int8 [out, in]."""
    scb, layout = (f"{name.removesuffix('weight')}{part}" for part in ("SCB", "weight_format"))
    shape = files.shapes[name]
    if len(shape) != 2:
        raise CheckpointError(f"{files.files[name]}: {name} has shape {list(shape)}; expected two")
    files.require(scb, shape[:1], *FLOATS, why="for the rows")
    if layout in files.shapes and files.read(layout).any():
        raise CheckpointError(f"{files.files[layout]}: {layout} is not that of rows, 0")
    kind = described(shape, Integer(8, "row"))

    def read() -> Quantized:
        scale = files.finite(scb).astype(np.float32)[:, None] / np.float32(127)
        codes = files.read(name).view(np.uint8) ^ 0x80
        return kind.replace(codes=codes, scale=scale)

    parts = (name, scb, layout) if layout in files.shapes else (name, scb)
    return Matrix(parts, shape, kind, read)


def four_bits(files: Stored, name: str) -> Matrix:
    """The matrix `name`, two codes to a byte."""
    states = [f"{name}{STATE}{kind}" for kind in KINDS if f"{name}{STATE}{kind}" in files.shapes]
    if not states:
        raise CheckpointError(
            f"{files.files[name]}: {name} is of dtype U8 and lacks {name}{STATE}nf4 or fp4"
        )
    state = state_of(files, states[0])
    table, block, shape = KINDS[state["quant_type"]], state["blocksize"], tuple(state["shape"])
    numbers, nested = shape[0] * shape[1], f"{name}.nested_absmax" in files.shapes
    format = Codebook(table, block, nested)
    blocks, said = -(-numbers // block), f"for {numbers} numbers in blocks of {block}"
    maps = {f"{name}.quant_map": table}
    files.require(name, (-(-numbers // 2), 1), OCTET, why=said)
    absmax = [f"{name}.absmax"]
    files.require(absmax[0], (blocks,), *([OCTET] if nested else FLOATS), why=said)
    if nested:
        absmax.append(f"{name}.nested_absmax")
        files.require(absmax[1], (-(-blocks // double.BLOCK),), *FLOATS, why="in blocks of 256")
        maps[f"{name}.nested_quant_map"] = double.TABLE
        _require_nested(files, states[0], state)
    for part, expected in maps.items():
        require_table(files, part, expected)

    def flat() -> Quantized:
        """The matrix as one row."""
        scale: Any = files.finite(absmax[0]).astype(OCTET if nested else np.float32)[None]
        if nested:
            offset = np.float32(state["nested_offset"])
            second = files.finite(absmax[1]).astype(np.float32)
            scale = double.DoubleQuantized(scale, second, offset)
        return Quantized(files.read(name).reshape(1, -1), scale, None, format, transposed=False)

    parts = (name, states[0], *absmax, *maps)
    if shape[1] % block or shape[1] % 2:
        why = f"its blocks of {block} do not end with rows of {shape[1]}"
        return Matrix(parts, shape, why, lambda: _unrolled(flat(), block, shape))
    kind = described(shape, format)

    def read() -> Quantized:
        leaves = zip(jax.tree.leaves(flat()), jax.tree.leaves(kind), strict=True)
        shaped = [np.reshape(array, like.shape) for array, like in leaves]
        return jax.tree.unflatten(jax.tree.structure(kind), shaped)

    return Matrix(parts, shape, kind, read)


def _unrolled(flat: Quantized, block: int, shape: tuple[int, ...]) -> np.ndarray:
    """The dense matrix of a row whose last block may be short."""
    octets = flat.codes[0]
    codes = np.stack([octets >> 4, octets & 0x0F], axis=-1).reshape(-1)[: shape[0] * shape[1]]
    scale = np.asarray(double.scales(flat.scale))[0]
    each = np.repeat(scale, block)[: codes.size]
    return (tables.table_of(flat.format.table)[codes] * each).reshape(shape)


def state_of(files: Stored, name: str) -> dict[str, Any]:
    """The JSON in a tensor; CheckpointError unless it says what the arrays' shapes hang on."""
    files.dtype(name, OCTET)
    where = f"{files.files[name]}: {name}"
    try:
        state = json.loads(files.read(name).tobytes())
        whole = [*state["shape"], state["blocksize"]]
        sound = len(whole) == 3 and all(isinstance(n, int) and n > 0 for n in whole)
        if not sound or state["quant_type"] not in KINDS:
            raise ValueError(f"says {state}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where} is no description of a matrix in nf4 or fp4: {error}"
        ) from error
    return state


def _require_nested(files: Stored, name: str, state: dict[str, Any]) -> None:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    finite = isinstance(offset, int | float) and np.isfinite(offset)
    if block != double.BLOCK or not finite:
        raise CheckpointError(
            f"{files.files[name]}: {name}: nested_blocksize = {block!r}, nested_offset = "
            f"{offset!r}; expected {double.BLOCK} and a finite number"
        )


def require_table(files: Stored, name: str, table: str) -> None:
    """CheckpointError unless a stored map from codes to numbers is our table of that name."""
    expected = tables.table_of(table)
    files.require(name, expected.shape, *FLOATS)
    if not np.array_equal(files.read(name).astype(np.float32), expected):
        raise CheckpointError(f"{files.files[name]}: {name} is not the table {table}")
