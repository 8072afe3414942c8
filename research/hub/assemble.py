"""Between named checkpoint tensors and a parameter tree: one name map, read in two directions.

Everything is checked against shapes alone before the first array is allocated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from research.hub.checkpoint import Checkpoint, CheckpointError
from research.hub.quantized_stack import stacked
from research.models.families.checkpoint import Entry
from research.paths import named_leaves
from research.types import Params
from research.weights.base import is_weight, merge

SHOWN = 8
# Buffers in old checkpoints that follow from the config.
DERIVED = (
    ".rotary_emb.inv_freq",
    ".rotary_pos_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
)


@dataclass(frozen=True)
class Part:
    """What a checkpoint tensor, or some columns of it, is in our tree.

    layer is None for a leaf that is not stacked. shape is the tensor's, as the checkpoint holds it.
    """

    entry: Entry
    layer: int | None
    shape: tuple[int, ...]

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor of the checkpoint -> what is ours of it, [in, out]."""
        ours = tensor.T if self.entry.transpose else tensor
        return ours if self.entry.columns is None else self.entry.columns.of(ours)


def parts(entries: Sequence[Entry], shapes: Params) -> dict[str, tuple[Part, ...]]:
    """{checkpoint name: what it holds} for a tree of arrays or ShapeDtypeStructs.

    Raises CheckpointError when the name map and the tree do not cover each other.
    """
    leaves = {path: tuple(leaf.shape) for path, leaf in named_leaves(shapes)}
    mapped = {entry.path for entry in entries}
    if mapped != set(leaves) or len(mapped) != len(entries):
        twice = {path for path, count in Counter(e.path for e in entries).items() if count > 1}
        raise CheckpointError(
            "the name map and the parameters disagree: "
            f"no checkpoint name for {_some(leaves.keys() - mapped)}; "
            f"no parameter at {_some(mapped - leaves.keys())}; named twice {_some(twice)}"
        )
    found: dict[str, tuple[Part, ...]] = {}
    for entry in entries:
        shape = leaves[entry.path]
        whole = _whole(entry, shape[1:] if entry.stacked else shape)
        for layer in range(shape[0]) if entry.stacked else (None,):
            name = entry.name_of(layer)
            found[name] = (*found.get(name, ()), Part(entry, layer, whole))
    for name, held in found.items():
        _require_cover(name, held)
    return found


def _whole(entry: Entry, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor that holds a leaf (or layer of one) of shape `ours`."""
    if entry.columns is not None:
        width = entry.columns.stop - entry.columns.start
        if width < 1 or ours[-1] % width:
            raise CheckpointError(
                f"the name map cuts {entry.path} from {entry.name} in groups of {width} columns, "
                f"and it has {ours[-1]}"
            )
        ours = (*ours[:-1], entry.columns.packed(ours[-1]))
    return ours[::-1] if entry.transpose else ours


def _require_cover(name: str, held: tuple[Part, ...]) -> None:
    """CheckpointError unless the parts of one tensor are all of it, once, and agree on its shape."""
    columns = sorted(
        (c.start, c.stop, c.size) for part in held if (c := part.entry.columns) is not None
    )
    whole = len(held) == 1 and not columns
    if not whole and (
        len({part.shape for part in held}) != 1
        or len(columns) != len(held)
        or [start for start, _, _ in columns] != [0, *(stop for _, stop, _ in columns[:-1])]
        or {columns[-1][1]} != {size for _, _, size in columns}
    ):
        paths = sorted(part.entry.path for part in held)
        raise CheckpointError(f"the name map makes {name} of parts that do not fit: {_some(paths)}")


def with_prefix(checkpoint: Checkpoint, expected: dict[str, tuple[Part, ...]]) -> Checkpoint:
    """The checkpoint under the names expected, if it is one of the trunk without the head.

    Such a one ('h.0.ln_1.weight') lacks the first word of every name ('transformer.h.0.ln_1.weight').
    """
    tables = [name for name, held in expected.items() if held[0].entry.path == "embed/table"]
    prefix = tables[0].partition(".")[0] + "." if tables else ""
    if not tables or tables[0] in checkpoint.shapes:
        return checkpoint
    if tables[0].removeprefix(prefix) not in checkpoint.shapes:
        return checkpoint
    stored = {
        name if name.startswith("lm_head.") else prefix + name: name for name in checkpoint.shapes
    }
    shapes = {name: checkpoint.shapes[old] for name, old in stored.items()}
    return replace(
        checkpoint,
        shapes=shapes,
        read=lambda name: checkpoint.read(stored[name]),
        coded={n: checkpoint.coded[old] for n, old in stored.items() if old in checkpoint.coded},
        read_coded=lambda name: checkpoint.read_coded(stored[name]),
    )


def require_agreement(checkpoint: Checkpoint, expected: dict[str, tuple[Part, ...]]) -> None:
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
        found, wanted = checkpoint.shapes[name], expected[name][0].shape
        if found != wanted:
            problems.append(
                f"{name} has shape {list(found)}, expected {list(wanted)} from the config"
            )
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError("\n  ".join([f"{where}:", *problems[:SHOWN]]) + more)


def _copies_of_tied(
    checkpoint: Checkpoint, expected: dict[str, tuple[Part, ...]], surplus: set[str]
) -> set[str]:
    """A head written out although it is tied is fine as long as it is the embedding table."""
    tables = [name for name, held in expected.items() if held[0].entry.path == "embed/table"]
    if not tables or "lm_head.weight" not in surplus or tables[0] not in checkpoint.shapes:
        return set()
    table, head = checkpoint.read(tables[0]), checkpoint.read("lm_head.weight")
    return {"lm_head.weight"} if np.array_equal(table, head) else set()


def assemble(
    checkpoint: Checkpoint,
    entries: Sequence[Entry],
    shapes: Params,
    dtype: Any = jnp.float32,
    shardings: Params | None = None,
) -> Params:
    """The parameter tree of a checkpoint, each leaf where `shardings` puts it.

    shapes: the tree of ShapeDtypeStructs to fill. Besides the tree, one leaf's shard and one tensor
    are held: leaves are filled shard by shard and layer by layer, and a tensor is read again for
    each different shard that it goes into. What the checkpoint has in few bits stays so where it can
    (`quantized_stack`), with no sharding.
    """
    expected = parts(entries, shapes)
    checkpoint = with_prefix(checkpoint, expected)
    require_agreement(checkpoint, expected)
    by_path: dict[str, list[tuple[str, Part]]] = {}
    for name, held in expected.items():
        for part in held:
            by_path.setdefault(part.entry.path, []).append((name, part))

    def fill(path: str, shape: tuple[int, ...], home: Sharding | None) -> Any:
        if (kept := stacked(path, by_path[path], checkpoint)) is not None:
            return kept
        read = partial(_read_shard, checkpoint, by_path[path], shape, dtype)
        if home is None:
            return jnp.asarray(read((slice(None),) * len(shape)))
        return _place(read, shape, home)

    leaves, tree = jax.tree.flatten(shapes)
    paths = [path for path, _ in named_leaves(shapes)]
    homes = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    filled = [
        fill(path, leaf.shape, home) for path, leaf, home in zip(paths, leaves, homes, strict=True)
    ]
    return jax.tree.unflatten(tree, filled)


def _place(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], home: Sharding
) -> jax.Array:
    """An array of `shape` from the shards that `read` gives, one on the host at a time."""
    devices: dict[tuple, list[jax.Device]] = {}
    for device, index in home.addressable_devices_indices_map(shape).items():
        devices.setdefault(tuple((cut.start, cut.stop) for cut in index), []).append(device)
    arrays = []
    for bounds, copies in devices.items():
        shard = read(tuple(slice(*bound) for bound in bounds))
        arrays += [jax.device_put(shard, device) for device in copies]
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(shape, home, arrays)


def _read_shard(
    checkpoint: Checkpoint,
    tensors: Sequence[tuple[str, Part]],
    shape: tuple[int, ...],
    dtype: Any,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part `index` of a leaf of `shape`, whose layers are `tensors`, read one by one."""
    bounds = [range(size)[cut] for size, cut in zip(shape, index, strict=True)]
    shard = np.empty([len(one) for one in bounds], dtype)
    for name, part in tensors:
        if part.layer is None:
            shard[...] = part.read(checkpoint.read(name))[index]
        elif part.layer in bounds[0]:
            row = part.layer - bounds[0].start
            shard[row] = part.read(checkpoint.read(name))[index[1:]]
    return shard


def disassemble(
    entries: Sequence[Entry], params: Params
) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], Iterator[tuple[str, np.ndarray]]]:
    """({name: (shape, dtype)}, the tensors one by one in the same order), as a checkpoint has them.

    Weights are merged into the matrices they stand for, the leaves of one tensor at a time.
    """
    merged = jax.eval_shape(merge, params)
    expected = parts(entries, merged)
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in named_leaves(merged)}
    specs = {
        name: (held[0].shape, jnp.result_type(*(dtypes[part.entry.path] for part in held)))
        for name, held in expected.items()
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        leaves = dict(named_leaves(params, is_leaf=is_weight))
        wholes: dict[str, np.ndarray] = {}
        for name, held in expected.items():
            paths = [part.entry.path for part in held]
            if wholes.keys() != set(paths):
                wholes = {path: np.asarray(merge(leaves[path])) for path in paths}
            yield name, _pack(held, wholes, specs[name][1])

    return specs, tensors()


def _pack(held: tuple[Part, ...], wholes: dict[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
    """One checkpoint tensor from the leaves it holds."""
    arrays = [wholes[part.entry.path][... if part.layer is None else part.layer] for part in held]
    entry = held[0].entry
    if entry.columns is None:
        return np.ascontiguousarray(arrays[0].T if entry.transpose else arrays[0])
    shape = held[0].shape[::-1] if entry.transpose else held[0].shape
    tensor = np.empty(shape, dtype)
    for part, array in zip(held, arrays, strict=True):
        part.entry.columns.put(tensor, array)
    return np.ascontiguousarray(tensor.T) if entry.transpose else tensor


def _some(names: Any) -> str:
    """A few of many names, in order."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more if ordered else "none"
