"""Directories of GPTQ and AWQ: codes in words of 32 bits, [in, out], groups along `in`.

    W = scales[g] * (code - zero[g])         g = the group of an input

GPTQ (Frantar et al. 2022, arXiv:2210.17323), as AutoGPTQ and its successors write it:
    NAME.qweight  int32 [in * bits / 32, out]      packed along `in`, the first code in the lowest bits
    NAME.qzeros   int32 [groups, out * bits / 32]  packed along `out`; one less than the zeros, modulo
                                                   2^bits, unless checkpoint_format is "gptq_v2"
    NAME.scales   float [groups, out]
    NAME.g_idx    int32 [in], the group of each input
Codes of 3 bits run on from word to word. With desc_act g_idx is a permutation: neighbouring inputs
then have different scales, for which there is no format here, and the matrix is read dense.

AWQ (Lin et al. 2023, arXiv:2306.00978), version "gemm":
    NAME.qweight  int32 [in, out / 8]              packed along `out`, the columns of a word in AWQ_ORDER
    NAME.qzeros   int32 [groups, out / 8]          likewise, the zeros themselves
    NAME.scales   float [groups, out]

A scale keeps the dtype that it has on file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.codes.packing import pack
from research.hub.checkpoint import CheckpointError
from research.hub.quantized_stack import described
from research.hub.quantized_tensors import DTYPES, FLOATS, Matrix, Stored, bits_in_words
from research.weights.formats import Integer
from research.weights.quantized import Quantized

WORD = 32
GPTQ_BITS = (2, 3, 4, 8)
# Which of eight neighbouring columns each four bits of a word hold, the lowest bits first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(files: Stored, description: dict[str, Any]) -> dict[str, Matrix]:
    """{name: matrix}; CheckpointError naming the field or the tensor that is missing or wrong."""
    bits = _one_of(files, description, "bits", GPTQ_BITS)
    # Both versions of the layout are told apart by this field; without it, it is the first.
    layout = _one_of(files, description, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    _one_of(files, description, "pack_dtype", ("int32",), "int32")
    _one_of(files, description, "dynamic", (None, {}), None)
    less = 0 if layout == "gptq_v2" else 1
    return {
        f"{stem}.weight": _gptq(files, stem, bits, group, less)
        for stem, group in _stems(files, description)
    }


def awq(files: Stored, description: dict[str, Any]) -> dict[str, Matrix]:
    """As `gptq`."""
    _one_of(files, description, "bits", (4,))
    _one_of(files, description, "version", ("gemm", "GEMM"), "gemm")
    _one_of(files, description, "zero_point", (True,), True)
    return {
        f"{stem}.weight": _awq(files, stem, group) for stem, group in _stems(files, description)
    }


def _one_of(files: Stored, description: dict, field: str, allowed: tuple, *default: Any) -> Any:
    value = description.get(field, *default)
    if value not in allowed:
        raise CheckpointError(
            f"{files.path}: quantization_config: {field} = {value!r} is not supported, only "
            f"{' or '.join(map(repr, allowed))}"
        )
    return value


def _stems(files: Stored, description: dict[str, Any]) -> list[tuple[str, int]]:
    """(name without '.weight', size of its groups) of each quantized matrix."""
    size = description.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or not (size > 0 or size == -1):
        raise CheckpointError(
            f"{files.path}: quantization_config: group_size = {size!r}; expected a whole number "
            "above 0, or -1"
        )
    found = [n.removesuffix(".qweight") for n in files.shapes if n.endswith(".qweight")]
    if not found:
        raise CheckpointError(f"{files.path}: config.json says quantized, and there is no qweight")
    return [(stem, size) for stem in found]


def _gptq(files: Stored, stem: str, bits: int, group: int, less: int) -> Matrix:
    name = f"{stem}.qweight"
    words, outs = _two(files, name)
    ins = words * WORD // bits
    if words * WORD % bits:
        raise CheckpointError(
            f"{files.files[name]}: {name}: {words} words do not hold whole codes of {bits} bits"
        )
    size = ins if group == -1 else group
    order = f"{stem}.g_idx"
    files.require(order, (ins,), DTYPES["I32"], why=f"for codes of {bits} bits")
    groups = _require_groups(files, stem, (ins, outs), size, outs * bits // WORD)
    index = files.read(order)
    if index.min() < 0 or index.max() >= groups:
        raise CheckpointError(f"{files.files[order]}: {order} goes past the {groups} groups")

    def codes() -> np.ndarray:
        return bits_in_words(files.read(name).T, bits)

    def zeros() -> np.ndarray:
        return (bits_in_words(files.read(f"{stem}.qzeros"), bits) + less) & (2**bits - 1)

    format = Integer(bits, size, "integer")
    if np.array_equal(index, np.arange(ins) // size):
        return _matrix(files, stem, format, (outs, ins), (codes, zeros), (order,))

    def dense() -> np.ndarray:
        steps = codes().astype(np.float32) - zeros()[index].T
        return steps * files.finite(f"{stem}.scales").astype(np.float32)[index].T

    why = f"{order} puts neighbouring inputs into different groups (desc_act)"
    return Matrix((*_names(stem), order), (outs, ins), why, dense)


def _awq(files: Stored, stem: str, group: int) -> Matrix:
    ins, words = _two(files, f"{stem}.qweight")
    outs = words * 8
    size = ins if group == -1 else group
    _require_groups(files, stem, (ins, outs), size, words)
    codes = partial(_columns, files, f"{stem}.qweight")
    zeros = partial(_columns, files, f"{stem}.qzeros")
    parts = (lambda: codes().T, zeros)
    return _matrix(files, stem, Integer(4, size, "integer"), (outs, ins), parts)


def _names(stem: str) -> tuple[str, str, str]:
    return f"{stem}.qweight", f"{stem}.qzeros", f"{stem}.scales"


def _columns(files: Stored, name: str) -> np.ndarray:
    """Words [n, out / 8] of AWQ as codes [n, out]."""
    stored = bits_in_words(files.read(name), 4).reshape(-1, files.shapes[name][1], 8)
    return stored[..., np.argsort(AWQ_ORDER)].reshape(len(stored), -1)


def _two(files: Stored, name: str) -> tuple[int, int]:
    files.dtype(name, DTYPES["I32"])
    shape = files.shapes[name]
    if len(shape) != 2:
        raise CheckpointError(f"{files.files[name]}: {name} has shape {list(shape)}; expected two")
    return shape


def _require_groups(files: Stored, stem: str, shape: tuple[int, int], size: int, words: int) -> int:
    """How many groups there are; CheckpointError unless scales and zeros have so many rows."""
    ins, outs = shape
    why = f"for groups of {size}"
    if ins % size:
        name = f"{stem}.qweight"
        raise CheckpointError(
            f"{files.files[name]}: {name}: groups of {size} do not fill {ins} inputs"
        )
    files.require(f"{stem}.scales", (ins // size, outs), *FLOATS, why=why)
    files.require(f"{stem}.qzeros", (ins // size, words), DTYPES["I32"], why=why)
    return ins // size


def _matrix(
    files: Stored,
    stem: str,
    format: Integer,
    shape: tuple[int, int],
    parts: tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]],
    more: tuple[str, ...] = (),
) -> Matrix:
    """A matrix [out, in] whose codes [out, in] and zeros [groups, out] `parts` give."""
    codes, zeros = parts
    name, _, scales = _names(stem)
    try:
        kind = described(shape, format, DTYPES[files.dtypes[scales]], np.uint8)
    except ValueError as error:
        raise CheckpointError(f"{files.files[name]}: {name}: {error}") from error

    def read() -> Quantized:
        return kind.replace(
            codes=np.asarray(pack(jnp.asarray(codes()), format.bits)),
            scale=np.ascontiguousarray(files.finite(scales).T),
            zero=np.ascontiguousarray(zeros().T),
        )

    return Matrix((*_names(stem), *more), shape, kind, read)
