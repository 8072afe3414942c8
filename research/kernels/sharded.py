"""A kernel on a mesh: each device works on its own rows of the batch and its own heads.

XLA cannot look into a Pallas kernel or C++, or split the one loop of `blockwise`, and would gather its inputs
on every device. Attention needs no communication between rows or heads, so `shard_map` says it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from research.kernels.attend import Attend, require
from research.kernels.mask import Mask
from research.types import Array


def over_mesh(
    attend: Attend,
    mesh: Mesh | AbstractMesh,
    batch: tuple[str, ...] = ("data", "fsdp"),
    heads: str | None = "tensor",
) -> Attend:
    """The kernel with rows split along the mesh axes `batch` and heads along `heads`.

    ValueError, while tracing, when the axes do not divide rows, query heads and key/value heads.
    Dropout draws other numbers on every device: the rng is folded with the device's place.
    """
    rows = 1
    for axis in batch:
        rows *= mesh.shape[axis]

    def sharded(
        q: Array,
        k: Array,
        v: Array,
        mask: Mask,
        scale: float | None = None,
        dropout: tuple[float, Array] | None = None,
        softcap: float | None = None,
    ) -> Array:
        for argument, value in (("dropout", dropout), ("softcap", softcap)):
            if value is not None:
                require(attend, argument)
        _divides("rows", q.shape[0], rows)
        for name, array in (("query heads", q), ("key/value heads", k)):
            _divides(name, array.shape[2], 1 if heads is None else mesh.shape[heads])
        whole = PartitionSpec(batch, None, heads, None)
        static = mask.offset if isinstance(mask.offset, int) else None
        mask = mask.replace(offset=None) if static is not None else mask

        def local(q, k, v, mask, rng):
            mask = mask if static is None else mask.replace(offset=static)
            more: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
            if rng is not None:
                place = jax.lax.axis_index(batch if heads is None else (*batch, heads))
                more["dropout"] = (dropout[0], jax.random.fold_in(rng, place))
            return attend(q, k, v, mask, scale, **more)

        rng = None if dropout is None else dropout[1]
        specs = (
            whole,
            whole,
            whole,
            _mask_specs(mask, batch, heads),
            None if rng is None else PartitionSpec(),
        )
        return partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)(
            local
        )(q, k, v, mask, rng)

    return sharded


def on_ambient_mesh(attend: Attend, q: Array, k: Array) -> Attend:
    """The kernel on the mesh that a training step is traced under (`train.step` sets it), if there is one
    and its axes divide the rows; heads are split where they divide too."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or set(mesh.axis_names) != {"data", "fsdp", "tensor"}:
        return attend
    if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return attend
    even = all(x.shape[2] % mesh.shape["tensor"] == 0 for x in (q, k))
    return over_mesh(attend, mesh, heads="tensor" if even else None)


def _mask_specs(mask: Mask, batch: tuple[str, ...], heads: str | None) -> Mask:
    row = PartitionSpec(batch)
    specs = {
        "offset": PartitionSpec(),
        "prefix": row,
        "query_segments": row,
        "key_segments": row,
        "slopes": PartitionSpec(heads),
    }
    return mask.replace(**{name: s for name, s in specs.items() if getattr(mask, name) is not None})


def _divides(name: str, size: int, parts: int) -> None:
    if size % parts:
        raise ValueError(f"{size} {name} cannot be split over {parts} devices")
