"""Hugging Face directories whose config.json has a quantization_config.

Its `quant_method` says how several tensors describe one matrix. What can stays in few bits; what
cannot is read dense when the model is made, and printed. Tensors of no such matrix are plain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from research.hub import quantized_bnb, quantized_rows, quantized_words
from research.hub.checkpoint import Checkpoint, CheckpointError
from research.hub.huggingface import CONFIG, opened, read_json, require_float
from research.hub.huggingface import open_directory as open_plain
from research.hub.quantized_tensors import stored
from research.weights.quantized import Quantized

FIELD = "quantization_config"
# What the tensors of a method mean: (stored tensors, description) -> {name: Matrix}.
METHODS = {
    quantized_rows.METHOD: quantized_rows.matrices,
    "bitsandbytes": quantized_bnb.matrices,
    "gptq": quantized_words.gptq,
    "awq": quantized_words.awq,
}


def open_directory(path: str | Path) -> Checkpoint:
    """The checkpoint in a directory, quantized or not. Only headers and what descriptions hang on are
    read.

    CheckpointError for a method, a number of bits or a layout that is not supported, and for tensors
    that are missing or do not fit, each by name.
    """
    path = Path(path)
    config = read_json(path / CONFIG) if path.is_dir() else {}
    description = config.get(FIELD)
    if not description:
        return open_plain(path)
    files = stored(path)
    matrices = METHODS[method_of(path, description)](files, description)
    used = {part for matrix in matrices.values() for part in matrix.parts}
    plain = files.shapes.keys() - used
    for name in sorted(plain):
        with opened(files.files[name]) as tensors:
            require_float(files.files[name], name, tensors)

    def read(name: str) -> np.ndarray:
        return matrices[name].dense() if name in matrices else files.read(name)

    def read_coded(name: str) -> Quantized:
        return matrices[name].read()

    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    shapes |= {name: files.shapes[name] for name in plain}
    coded = {name: matrix.kind for name, matrix in matrices.items()}
    dense = {name: value for name, value in config.items() if name != FIELD}
    return Checkpoint(path, dense, shapes, read, coded, read_coded)


def method_of(path: Path, description: Any) -> str:
    method = description.get("quant_method") if isinstance(description, dict) else description
    if method not in METHODS:
        raise CheckpointError(
            f"{path / CONFIG}: {FIELD}: quant_method = {method!r} is not supported; supported: "
            f"{', '.join(METHODS)}"
        )
    return method
