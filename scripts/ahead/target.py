"""Devices that are not here, and programs compiled for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

DESCRIPTIONS = Path(__file__).parents[1] / "targets"
TARGETS = ("h100", "a100")


def devices(name: str, count: int = 1) -> Sequence[Any]:
    """So many devices of a kind, as the compiler sees them."""
    config = (DESCRIPTIONS / f"{name}.txtpb").read_text()
    return topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=config, topology=f"1x1x{count}"
    ).devices


def compiled(function: Callable, args: Any, sharding: Any, dump: str | None = None) -> Any:
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    args = jax.tree.map(place, args)
    options = {} if dump is None else {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
    return jax.jit(function).lower(*args).compile(compiler_options=options)
