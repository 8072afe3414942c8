"""Hugging Face model directories: config.json and safetensors files, in and out.

Weights are one model.safetensors, or many files with model.safetensors.index.json saying which
tensor lies where. Pickled weights (.bin, .pt) are never opened.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from research.hub.checkpoint import Checkpoint, CheckpointError

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F16", "BF16", "F32", "F64")
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"


def open_directory(path: str | Path) -> Checkpoint:
    """The checkpoint in a directory. Only headers are read.

    Raises CheckpointError when a file is missing, damaged, or contradicts the index.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory")
    config = read_json(path / CONFIG)
    files = weight_files(path)
    shapes = {}
    for file in sorted(set(files.values())):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
                require_float(file, name, tensors)

    def read(name: str) -> np.ndarray:
        with opened(files[name]) as tensors:
            return tensors.get_tensor(name)

    return Checkpoint(path, config, shapes, read)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError naming the file when it is not one."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped; CheckpointError when its header or size is wrong."""
    try:
        handle = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({error})") from error
    with handle as tensors:
        yield tensors


def require_float(file: Path, name: str, tensors: Any) -> None:
    """CheckpointError unless the tensor's numbers are weights as they stand, not codes of some."""
    dtype = tensors.get_slice(name).get_dtype()
    if dtype not in FLOATS:
        raise CheckpointError(f"{file}: {name} is of dtype {dtype}; expected one of {FLOATS}")


def weight_files(path: Path) -> dict[str, Path]:
    """{tensor name: file}, from the index when there is one."""
    if (path / INDEX).exists():
        return indexed_files(path)
    file = path / WEIGHTS
    if not file.exists():
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        hint = f"; pickled weights are not opened: {others}" if others else ""
        raise CheckpointError(f"{path}: holds neither {WEIGHTS} nor {INDEX}{hint}")
    with opened(file) as tensors:
        return dict.fromkeys(tensors.keys(), file)


def indexed_files(path: Path) -> dict[str, Path]:
    """{tensor name: file} as the index says, when files and index agree."""
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: lacks the object 'weight_map'")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index}: weight_map says {file!r} for {tensor}, not a file name"
            )
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointError(f"{index}: names the file {name!r}, which is not in {path}")
        with opened(path / name) as tensors:
            held = set(tensors.keys())
        said = {tensor for tensor, file in weight_map.items() if file == name}
        if held != said:
            wrong = sorted(held ^ said)
            raise CheckpointError(
                f"{index}: disagrees with {name} about {len(wrong)} tensors, {wrong[0]!r} first"
            )
    return {tensor: path / file for tensor, file in weight_map.items()}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    directory: Path,
    specs: dict[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> None:
    """Safetensors files of at most `max_shard_bytes` (or one tensor), one file in memory at a time.

    specs: {name: (shape, dtype)} in the order of `tensors`. More than one file comes with an index.
    Raises CheckpointError when a file cannot be written.
    """
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in specs.items()}
    groups = shards(sizes, max_shard_bytes)
    stream = iter(tensors)
    weight_map = {}
    for number, names in enumerate(groups, start=1):
        single = len(groups) == 1
        file = WEIGHTS if single else SHARD.format(number=number, count=len(groups))
        held = dict(next(stream) for _ in names)
        write_tensors(directory / file, held)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / INDEX, index)


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file; CheckpointError when it cannot be written."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name}: could not be written ({error})") from error


def shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut so that each group's bytes stay within `limit` where one tensor allows."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups
