"""Tensors of a directory that together say what one matrix of few bits is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from research.hub.checkpoint import CheckpointError
from research.hub.huggingface import opened, weight_files
from research.weights.double import DoubleQuantized
from research.weights.quantized import Quantized

# What safetensors calls the types of numbers that codes, scales and zeros may have.
DTYPES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
FLOATS = tuple(dtype for name, dtype in DTYPES.items() if "F" in name)


@dataclass(frozen=True)
class Matrix:
    """One matrix [out, in], made of the stored tensors `parts`.

    kind: the `Quantized` of its shapes, or a sentence that says why it is read dense, when `read`
    gives an array.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Quantized | str
    read: Callable[[], Quantized | np.ndarray]

    def dense(self) -> np.ndarray:
        held = self.read()
        return np.asarray(held.dense()) if isinstance(held, Quantized) else held


@dataclass(frozen=True)
class Stored:
    """Every tensor of a directory by name. Only headers have been read."""

    path: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        with opened(self.files[name]) as tensors:
            return tensors.get_tensor(name)

    def dtype(self, name: str, *allowed: np.dtype) -> np.dtype:
        """The type of a tensor's numbers; CheckpointError when it is missing or not one of these."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.path}: lacks the tensor {name}")
        found = DTYPES.get(self.dtypes[name])
        if found not in allowed:
            wanted = " or ".join(dtype.name for dtype in allowed)
            raise CheckpointError(
                f"{self.files[name]}: {name} is of dtype {self.dtypes[name]}; expected {wanted}"
            )
        return found

    def require(self, name: str, shape: Sequence[int], *allowed: np.dtype, why: str = "") -> None:
        """CheckpointError naming file and tensor unless it is there, of this shape and type."""
        self.dtype(name, *allowed)
        if self.shapes[name] != tuple(shape):
            raise CheckpointError(
                f"{self.files[name]}: {name} has shape {list(self.shapes[name])}, "
                f"expected {list(shape)}{why and ' '}{why}"
            )

    def finite(self, name: str) -> np.ndarray:
        """A tensor of scales; CheckpointError when one is nan or inf."""
        array = self.read(name)
        if not np.isfinite(array.astype(np.float32)).all():
            raise CheckpointError(f"{self.files[name]}: {name} holds nan or inf")
        return array


def stored(path: Path) -> Stored:
    files = weight_files(path)
    shapes, dtypes = {}, {}
    for file in sorted(set(files.values())):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                cut = tensors.get_slice(name)
                shapes[name], dtypes[name] = tuple(cut.get_shape()), cut.get_dtype()
    return Stored(path, files, shapes, dtypes)


def named_arrays(name: str, node: Quantized) -> dict[str, jax.Array]:
    """The arrays of a `Quantized` in tree order, under the names that a directory gives them."""
    found = {f"{name}.codes": node.codes}
    if isinstance(node.scale, DoubleQuantized):
        parts = ("codes", "absmax", "offset")
        found |= {f"{name}.scale.{part}": getattr(node.scale, part) for part in parts}
    else:
        found[f"{name}.scale"] = node.scale
    return found if node.zero is None else found | {f"{name}.zero": node.zero}


def bits_in_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n] -> codes uint8 [..., n * 32 / bits], lowest bits first, across words too."""
    octets = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    flat = np.unpackbits(octets, axis=-1, bitorder="little")
    codes = flat.reshape(*words.shape[:-1], flat.shape[-1] // bits, bits)
    return np.packbits(codes, axis=-1, bitorder="little")[..., 0]
