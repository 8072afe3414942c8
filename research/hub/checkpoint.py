"""What a model file is, whatever its format: a config and named arrays that are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from research.weights.quantized import Quantized


class CheckpointError(ValueError):
    """A model file is missing, damaged, unsupported, or does not agree with its config."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened file or directory. Nothing but headers has been read.

    config: the dictionary of a Hugging Face config.json. shapes: {Hugging Face name: shape}, a
    matrix being [out, in] as there. read: name -> array of that shape, in its stored precision
    (quantized tensors come as float32). coded: the tensors that can stay in few bits and what they
    are, or a sentence that says why they have to be read dense (`quantized_stack`). read_coded: name
    -> such a tensor, of NumPy arrays.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    coded: Mapping[str, Quantized | str] = field(default_factory=dict)
    read_coded: Callable[[str], Quantized] | None = None
