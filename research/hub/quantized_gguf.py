"""GGUF tensors in their own blocks of 32 numbers, as `Quantized` rows.

    Q4_0   d (q - 8)     q in 0..15            Integer(4, 32, "middle")
    Q4_1   d q + m       q in 0..15            Integer(4, 32, "minimum")
    Q8_0   d q           q in -128..127        Integer(8, 32, "middle"), code q + 128

d and m stay in float16, as the file has them, so that 32 numbers take 18, 20 and 34 bytes here too.
Only the order of nibbles changes: a block of the file has its first 16 numbers in the low nibbles of
16 bytes and the others in the high ones; ours has neighbours in one byte, the first one high.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from research.hub.checkpoint import CheckpointError
from research.hub.quantized_stack import described
from research.weights.formats import Integer
from research.weights.quantized import Quantized

BLOCK = 32
FORMATS = {
    Type.Q4_0: Integer(4, BLOCK, "middle"),
    Type.Q4_1: Integer(4, BLOCK, "minimum"),
    Type.Q8_0: Integer(8, BLOCK, "middle"),
}
PLAIN = (Type.F32, Type.F16, Type.BF16, Type.F64)


def kind(tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> Quantized | str | None:
    """The shapes and the format of a tensor [rows, columns] that is kept in its blocks.

    A string that says why not where it is of another quantized type; None where it is not quantized.
    """
    if tensor.tensor_type in PLAIN:
        return None
    if tensor.tensor_type not in FORMATS or len(shape) != 2:
        return f"{tensor.tensor_type.name} of shape {list(shape)} has no form in few bits here"
    return described(shape, FORMATS[tensor.tensor_type], np.float16)


def blocks(path: Path, tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> Quantized:
    """The tensor as `kind` says; CheckpointError for scales that are nan or inf."""
    format = FORMATS[tensor.tensor_type]
    _, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    cut = np.ascontiguousarray(tensor.data).reshape(shape[0], -1, size)
    floats = 2 if format.zero_point == "minimum" else 1
    heads = np.ascontiguousarray(cut[..., : 2 * floats]).view(np.float16)
    if not np.isfinite(heads).all():
        raise CheckpointError(f"{path}: tensor {tensor.name!r} holds scales that are nan or inf")
    stored = cut[..., 2 * floats :]
    codes = neighbours(stored) if format.bits == 4 else stored ^ 0x80
    return Quantized(
        codes.reshape(shape[0], -1),
        heads[..., 0].copy(),
        heads[..., 1].copy() if floats == 2 else None,
        format,
        transposed=False,
    )


def neighbours(nibbles: np.ndarray) -> np.ndarray:
    """Blocks [..., 16] of bytes from the file's order of nibbles to that of `codes.packing`."""
    codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)
    return codes[..., 0::2] << 4 | codes[..., 1::2]
