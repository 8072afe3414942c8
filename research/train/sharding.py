"""Where arrays live: a mesh of three axes and one table from logical axis names to mesh axes.

    data     copies of the model, different rows of the batch
    fsdp     different rows of the batch too; parameters are split along `embed` (ZeRO-3,
             arXiv:1910.02054), and gathered by XLA when a layer needs them
    tensor   heads, ffn and vocabulary are split (Megatron, arXiv:1909.08053)

Layers name logical axes and never mesh axes. A name tree has the structure of the parameters and a
tuple of logical names for each leaf, as `models.decoder.axes` gives it (a Weight holds one tuple
for each of its arrays).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.paths import map_named, named_leaves
from research.types import Array, Batch, Params, PyTree

BATCH_AXES = ("data", "fsdp")

RULES: Mapping[str | None, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "layers": None,
    "rank": None,
    None: None,
}


class ShardingError(ValueError):
    """A mesh, a batch or a table of axis names that do not fit each other."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first data * fsdp * tensor devices; ShardingError when there are fewer."""
    wanted, devices = data * fsdp * tensor, jax.devices()
    if min(data, fsdp, tensor) < 1 or wanted > len(devices):
        raise ShardingError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} needs {wanted} devices; "
            f"there are {len(devices)}"
        )
    # Linen's logical constraints raise on Explicit axes, which are make_mesh's default.
    shape, names = (data, fsdp, tensor), (*BATCH_AXES, "tensor")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted])


def shardings(
    names: PyTree,
    abstract: Params,
    mesh: Mesh,
    rules: Mapping[str | None, str | None] = RULES,
    units: Mapping[str, int] | None = None,
) -> tuple[PyTree, list[str]]:
    """(NamedSharding for each leaf of `abstract`, one line for each axis that had to be replicated).

    An axis is split when the mesh axis divides its size counted in `units`: {"heads": H} keeps
    heads whole, so that 9 heads of 64 are replicated over 2 although 576 is even. Two axes of one
    leaf never share a mesh axis: the first has it. ShardingError when a name has no rule or a tuple
    does not have one name for each axis.
    """
    unknown = {axis for axis in rules.values() if axis is not None} - set(mesh.shape)
    if unknown:
        raise ShardingError(
            f"the rules split along {sorted(unknown)}, the mesh has the axes {list(mesh.shape)}"
        )
    notes: list[str] = []

    def place(path: str, axes: tuple, leaf: Array) -> NamedSharding:
        spec, lines = _spec(path, axes, leaf.shape, mesh, rules, units or {})
        notes.extend(lines)
        return NamedSharding(mesh, spec)

    return map_named(place, names, abstract, is_leaf=_is_names), notes


def sharded_init(
    init: Callable[..., Params], names: PyTree, mesh: Mesh, *args: Any, **options: Any
) -> Params:
    """`init(*args)`, every leaf made straight in its shards; `options` are those of `shardings`."""
    placed, _ = shardings(names, jax.eval_shape(init, *args), mesh, **options)
    return jax.jit(init, out_shardings=placed)(*args)


def follow(tree: PyTree, params: Params, mesh: Mesh) -> PyTree:
    """Shardings for optimizer state: a leaf whose path ends in a parameter's path and that has its
    shape lives where the parameter lives, everything else is replicated."""
    homes = {name: (leaf.shape, leaf.sharding) for name, leaf in named_leaves(params)}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: str, leaf: Array) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):  # the longest suffix first: 'a/kernel' before 'kernel'
            shape, home = homes.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return home
        return everywhere

    return map_named(place, tree)


def sharding_of(tree: PyTree) -> PyTree:
    """Where each array of `tree` lives."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree` with every array on `mesh`: those already sharded over it stay, others are replicated."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def move(leaf: Any) -> Any:
        home = getattr(leaf, "sharding", None)
        placed = isinstance(home, NamedSharding) and home.mesh == mesh
        return leaf if placed else jax.device_put(leaf, everywhere)

    return jax.tree.map(move, tree)


def shard_batch(batch: Batch, mesh: Mesh, accumulate: int = 1) -> Batch:
    """Rows spread over the data and fsdp axes; ShardingError when a micro-batch does not divide."""
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))

    def move(name: str, leaf: Any) -> Array:
        if np.ndim(leaf) == 0:
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))
        if leaf.shape[0] % (ways * accumulate):
            raise ShardingError(
                f"batch[{name!r}] has {leaf.shape[0]} rows; a mesh of data={mesh.shape['data']}, "
                f"fsdp={mesh.shape['fsdp']} with {accumulate} micro-batches needs a multiple of "
                f"{ways * accumulate}"
            )
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))

    return map_named(move, batch)


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple)


def _spec(
    path: str,
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    rules: Mapping[str | None, str | None],
    units: Mapping[str, int],
) -> tuple[PartitionSpec, list[str]]:
    if len(axes) != len(shape):
        raise ShardingError(f"{path}: {len(axes)} axis names {axes} for shape {tuple(shape)}")
    spec: list[str | None] = []
    notes: list[str] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in rules:
            raise ShardingError(
                f"{path}: no sharding rule for axis {axis!r}; there are {set(rules)}"
            )
        target = rules[axis]
        ways = 1 if target is None else mesh.shape[target]
        blocks, rest = divmod(size, units.get(axis, 1))
        if ways == 1 or target in spec:
            target = None
        elif rest or blocks % ways:
            notes.append(
                f"{path}: {axis} ({blocks}) is replicated, {target}={ways} does not divide it"
            )
            target = None
        spec.append(target)
    return PartitionSpec(*spec), notes
