"""Saving a model whose matrices stay in few bits; `hub.load` opens it to the same Weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.hub.assemble import disassemble
from research.hub.checkpoint import CheckpointError
from research.hub.pretrained import MAX_SHARD_BYTES, Pretrained, config_to_save, write
from research.hub.quantized_directory import FIELD
from research.hub.quantized_rows import ABOUT, METHOD, describe
from research.hub.quantized_tensors import named_arrays
from research.models import families
from research.models.families.checkpoint import Entry
from research.paths import named_leaves
from research.weights.base import is_weight
from research.weights.quantized import Quantized, is_quantized

Specs = dict[str, tuple[tuple[int, ...], np.dtype]]


def save_quantized(
    directory: str | Path, pretrained: Pretrained, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a directory whose `Quantized` matrices keep their codes, scales and zeros, bit for bit.

    Files and description are those of `quantized_rows`; everything else is as `save` writes it, and
    an existing directory is replaced in the same way. `transformers` does not open it. Raises
    CheckpointError, naming the path, for a Weight of another kind (an adapter is `save_adapter`'s),
    for a matrix that the family's checkpoints pack with others, and when nothing is quantized.
    """
    family = families.find(pretrained.config)
    leaves = dict(named_leaves(pretrained.params, is_leaf=is_weight))
    plain, coded = divided(family.name_map(pretrained.model.config), leaves)
    dense = jax.tree.map(
        lambda w: None if is_quantized(w) else w, pretrained.params, is_leaf=is_weight
    )
    specs, tensors = disassemble(plain, dense)
    description, more = describe_all(coded, leaves)
    config = config_to_save(pretrained, family) | {FIELD: description}
    config["dtype"] = next(iter(specs.values()))[1].name
    stream = _chain(tensors, coded, leaves)
    write(directory, pretrained, config, specs | more, stream, max_shard_bytes)


def divided(entries: Sequence[Entry], leaves: dict[str, Any]) -> tuple[list[Entry], list[Entry]]:
    """(entries of arrays, entries of `Quantized` matrices)."""
    for path, w in leaves.items():
        if is_weight(w) and not is_quantized(w):
            raise CheckpointError(
                f"{path} is a {type(w).__name__}, which has no form in files: merge it or take it "
                "off first (an adapter is saved by `save_adapter`)"
            )
    coded = [entry for entry in entries if is_quantized(leaves.get(entry.path))]
    for entry in coded:
        if entry.columns is not None:
            raise CheckpointError(
                f"{entry.path} is quantized, and checkpoints hold it as columns of {entry.name} "
                "with other matrices: `save` writes it dense"
            )
    if not coded:
        raise CheckpointError("no matrix is quantized: `save` writes dense ones")
    return [entry for entry in entries if entry not in coded], coded


def describe_all(coded: list[Entry], leaves: dict[str, Any]) -> tuple[dict[str, Any], Specs]:
    """(the quantization_config, the shapes and dtypes of all arrays of these matrices)."""
    formats: dict[str, dict] = {}
    used, specs = {}, {}
    for entry in coded:
        node = leaves[entry.path]
        try:
            said = describe(node.format, node.transposed != entry.transpose)
        except ValueError as error:
            raise CheckpointError(f"{entry.path}: {error}") from error
        name = next((n for n, other in formats.items() if other == said), None)
        if name is None:
            name = f"{said['kind']}_{len(formats)}"
            formats[name] = said
        for tensor, layer in layers_of(entry, jax.eval_shape(lambda w: w, node)):
            used[tensor] = name
            specs |= {
                n: (tuple(leaf.shape), np.dtype(leaf.dtype))
                for n, leaf in named_arrays(tensor, layer).items()
            }
    about = {"quant_method": METHOD, "about": ABOUT, "formats": formats, "tensors": used}
    return about, specs


def layers_of(entry: Entry, node: Quantized) -> Iterator[tuple[str, Quantized]]:
    """(checkpoint name, matrix) of each layer of a stack, or of the one matrix."""
    if not entry.stacked:
        yield entry.name, node
        return
    for layer in range(node.codes.shape[0]):
        yield entry.name_of(layer), jax.tree.map(lambda leaf, i=layer: _layer(leaf, i), node)


def _layer(leaf: Any, number: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=leaf.shape[1:])
    return leaf[number]


def _chain(
    tensors: Iterator[tuple[str, np.ndarray]], coded: list[Entry], leaves: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    yield from tensors
    for entry in coded:
        held = jax.tree.map(np.asarray, leaves[entry.path])
        for name, layer in layers_of(entry, held):
            for part, array in named_arrays(name, layer).items():
                yield part, np.asarray(array, order="C")
