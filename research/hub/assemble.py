"""Between named checkpoint tensors and a parameter tree: one name map, read in two directions.

Everything is checked against shapes alone before the first array is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.hub.checkpoint import Checkpoint, CheckpointError
from research.models.families.checkpoint import Entry
from research.paths import named_leaves
from research.types import Params
from research.weights.base import is_weight, merge

SHOWN = 8
DERIVED = (".rotary_emb.inv_freq",)  # buffers in old checkpoints that follow from the config


@dataclass(frozen=True)
class Part:
    """What one checkpoint tensor is in our tree: a leaf, or one layer of a stacked leaf."""

    entry: Entry
    layer: int | None
    shape: tuple[int, ...]  # as the checkpoint holds it


def parts(entries: Sequence[Entry], shapes: Params) -> dict[str, Part]:
    """{checkpoint name: part} for a tree of arrays or ShapeDtypeStructs.

    Raises CheckpointError when the name map and the tree do not cover each other.
    """
    leaves = {path: tuple(leaf.shape) for path, leaf in named_leaves(shapes)}
    mapped = {entry.path for entry in entries}
    if mapped != set(leaves):
        raise CheckpointError(
            "the name map and the parameters disagree: "
            f"no checkpoint name for {_some(leaves.keys() - mapped)}; "
            f"no parameter at {_some(mapped - leaves.keys())}"
        )
    found = {}
    for entry in entries:
        shape = leaves[entry.path]
        inner = shape[1:] if entry.stacked else shape
        inner = inner[::-1] if entry.transpose else inner
        for layer in range(shape[0]) if entry.stacked else (None,):
            found[entry.name.format(layer=layer)] = Part(entry, layer, inner)
    return found


def require_agreement(checkpoint: Checkpoint, expected: dict[str, Part]) -> None:
    """CheckpointError naming every kind of difference in names and shapes."""
    where = checkpoint.path
    present = {name for name in checkpoint.shapes if not name.endswith(DERIVED)}
    missing, surplus = expected.keys() - present, present - expected.keys()
    surplus -= _copies_of_tied(checkpoint, expected, surplus)
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} weights that its config asks for: {_some(missing)}")
    if surplus:
        problems.append(f"holds {len(surplus)} weights with no place: {_some(surplus)}")
    for name in sorted(expected.keys() & present):
        if checkpoint.shapes[name] != expected[name].shape:
            problems.append(
                f"{name} has shape {list(checkpoint.shapes[name])}, "
                f"expected {list(expected[name].shape)} from the config"
            )
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError("\n  ".join([f"{where}:", *problems[:SHOWN]]) + more)


def _copies_of_tied(
    checkpoint: Checkpoint, expected: dict[str, Part], surplus: set[str]
) -> set[str]:
    """A head written out although it is tied is fine as long as it is the embedding table."""
    tables = [name for name, part in expected.items() if part.entry.path == "embed/table"]
    if not tables or "lm_head.weight" not in surplus or tables[0] not in checkpoint.shapes:
        return set()
    table, head = checkpoint.read(tables[0]), checkpoint.read("lm_head.weight")
    return {"lm_head.weight"} if np.array_equal(table, head) else set()


def assemble(
    checkpoint: Checkpoint, entries: Sequence[Entry], shapes: Params, dtype: Any = jnp.float32
) -> Params:
    """The parameter tree of a checkpoint; one tensor at a time is held besides it.

    shapes: the tree of ShapeDtypeStructs to fill. Stacked leaves are filled layer by layer.
    """
    expected = parts(entries, shapes)
    require_agreement(checkpoint, expected)
    by_path: dict[str, list[tuple[str, Part]]] = {}
    for name, part in expected.items():
        by_path.setdefault(part.entry.path, []).append((name, part))

    def fill(path: str, shape: tuple[int, ...]) -> jax.Array:
        whole = np.empty(shape, dtype)
        for name, part in by_path[path]:
            array = checkpoint.read(name)
            whole[... if part.layer is None else part.layer] = (
                array.T if part.entry.transpose else array
            )
        return jnp.asarray(whole)

    leaves, tree = jax.tree.flatten(shapes)
    paths = [path for path, _ in named_leaves(shapes)]
    filled = [fill(path, leaf.shape) for path, leaf in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(tree, filled)


def disassemble(
    entries: Sequence[Entry], params: Params
) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], Iterator[tuple[str, np.ndarray]]]:
    """({name: (shape, dtype)}, the tensors one by one in the same order), as a checkpoint has them.

    Weights are merged into the matrices they stand for, one leaf at a time.
    """
    merged = jax.eval_shape(merge, params)
    expected = parts(entries, merged)
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in named_leaves(merged)}
    specs = {name: (part.shape, dtypes[part.entry.path]) for name, part in expected.items()}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        leaves = dict(named_leaves(params, is_leaf=is_weight))
        path, whole = None, None
        for name, part in expected.items():
            if part.entry.path != path:
                path = part.entry.path
                whole = np.asarray(merge(leaves[path]))
            array = whole if part.layer is None else whole[part.layer]
            yield name, np.ascontiguousarray(array.T if part.entry.transpose else array)

    return specs, tensors()


def _some(names: Any) -> str:
    """A few of many names, in order."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more if ordered else "none"
