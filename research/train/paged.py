"""An optimizer whose state stays in the host's memory and is on the device only while it is used.

QLoRA (arXiv:2305.14314), section 3, pages through unified memory, which moves single pages when the
device is short of memory. Here every step moves every paged leaf both ways, whether or not there is
room; what a step costs more is printed by `python -m scripts.bench_paged`.

Where the backend has the memory kind `pinned_host`, the moves are part of the compiled step
(`jax.memory.Space`), and the state that a step takes and gives, donated as ever, lies there. Elsewhere
`init` and `update` move by `jax.device_get` and `jax.device_put`, which cannot be compiled: `fit` is
then refused.

Shown by tests on the CPU backend of jax 0.10.2, which names `device`, `pinned_host` and
`unpinned_host`, all of them the same memory: that types, checkpoints and numbers are right, and that
the state's arrays say `pinned_host` between steps. Not shown: that device memory falls on an
accelerator, and how far transfers hide behind computation there.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from research.types import Array, Params, PyTree

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"


def paged(
    inner: optax.GradientTransformation, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose numbers it gives to the last bit; leaves of its state with fewer than `min_size`
    numbers stay on the device, as numbers alone always do."""
    inner = optax.with_extra_args_support(inner)

    def is_paged(leaf: Array) -> bool:
        return leaf.ndim > 0 and leaf.size >= min_size

    def init(params: Params) -> PyTree:
        return _to_host(inner.init(params), is_paged)

    def update(updates: PyTree, state: PyTree, params: Params | None = None, **extra: Any):
        used = jax.tree.map(lambda leaf: _to_device(leaf) if is_paged(leaf) else leaf, state)
        moved, used = inner.update(updates, used, params, **extra)
        return moved, _to_host(used, is_paged)

    return optax.GradientTransformationExtraArgs(init, update)


def has_host_memory() -> bool:
    """Whether the backend can keep arrays of a compiled function in the host's memory."""
    return KIND in {memory.kind for memory in jax.devices()[0].addressable_memories()}


def is_on_host(leaf: Array) -> bool:
    """Whether an array, or a traced one, lies in the host's memory by its type."""
    return isinstance(leaf, np.ndarray) or jax.typeof(leaf).memory_space == HOST


def choose(condition: Array, new: Array, old: Array) -> Array:
    """`new` where the scalar condition holds, else `old`, computed on the device and kept where they
    were: an accelerator does not compute in the host's memory."""
    if not is_on_host(new):
        return jax.numpy.where(condition, new, old)
    return jax.device_put(
        jax.numpy.where(condition, jax.device_put(new, DEVICE), jax.device_put(old, DEVICE)), HOST
    )


def _to_host(tree: PyTree, is_paged: Any) -> PyTree:
    def move(leaf: Array) -> Array | np.ndarray:
        if not is_paged(leaf):
            return leaf
        if has_host_memory():
            return jax.device_put(leaf, HOST)
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(
                f"this backend has no memory of the kind {KIND!r}, so that a compiled step cannot "
                "leave optimizer state on the host; call `update` outside jit, or do not page"
            )
        return jax.device_get(leaf)

    return jax.tree.map(move, tree)


def _to_device(leaf: Array | np.ndarray) -> Array:
    return jax.device_put(leaf, DEVICE if has_host_memory() else None)
