"""Training steps for devices that are not here: peak memory by kernel and length, collectives of a mesh."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from research.kernels.attend import Attend, reference
from research.kernels.flash2 import flash2
from research.kernels.flash_tiles import flash_tiles
from research.kernels.sharded import over_mesh
from research.models import decoder
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.train.sharding import shardings
from scripts.ahead.target import compiled, devices

# FSDP gathers parameters and scatters gradients; rows of the table, split along `embed`, are looked up
# where they lie and exchanged. Tensor parallelism sums what each device has of a result.
EXPECTED = {"fsdp": {"all-gather", "reduce-scatter", "all-to-all"}, "tensor": {"all-reduce"}}
COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def step_rows(name: str, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Peak memory of a step of GPT-2's size in LLaMA's form, by kernel and T; 8 rows."""
    sharding, attend = SingleDeviceSharding(devices(name)[0]), kernel_of(name)
    kinds = {
        "reference": {"attend": reference},
        "flash2": {"attend": attend},
        "flash2, layers again": {"attend": attend, "remat": "full"},
    }
    for T, kind in product(lengths, kinds):
        if kind != "reference" or T <= 2048:  # beyond, no device holds it
            step, args = training(kinds[kind], T)
            memory = compiled(step, args, sharding).memory_analysis()
            yield {
                "device": name,
                "kind": kind,
                "length": T,
                "peak_bytes": memory.peak_memory_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
            }


def kernel_of(name: str) -> Attend:
    """flash2 as that device runs it, for heads of 64 numbers."""
    tiles = flash_tiles(64, jnp.bfloat16, devices(name)[0].device_kind)
    return partial(flash2, interpret=False, tiles=tiles)


def training(
    parts: dict[str, Any], T: int, layers: int = 12, heads: int = 12
) -> tuple[Callable, Any]:
    """(a step of AdamW in bfloat16 over float32 parameters, its arguments as shapes)."""
    model = Decoder(
        llama(50304, layers, 768, heads, heads, 3072, tied=True, dtype=jnp.bfloat16, **parts)
    )
    optimizer = optax.adamw(1e-4)

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(params, state, tokens):
        grads = jax.grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.eval_shape(partial(decoder.init, model), jax.random.key(0))
    state = jax.eval_shape(optimizer.init, params)
    return step, (params, state, jax.ShapeDtypeStruct((8, T), jnp.int32))


def check_steps(rows: Sequence[dict[str, Any]]) -> None:
    """AssertionError unless flash keeps to 0.45 of the reference's peak at 2048, and grows linearly."""
    peak = {(row["kind"], row["length"]): row["peak_bytes"] for row in rows}
    assert peak["flash2", 2048] <= 0.45 * peak["reference", 2048], peak
    for kind in ("flash2", "flash2, layers again"):
        first, second = (peak[kind, 2 * T] - peak[kind, T] for T in (1024, 2048))
        assert second <= 2.1 * first, f"{kind} grows faster than T: {peak}"


def mesh_rows(name: str) -> Iterator[dict[str, Any]]:
    """Collectives in the program of a step for 8 devices, split either way; 16 heads."""
    for axis in ("fsdp", "tensor"):
        sizes = {"data": 1, "fsdp": 1, "tensor": 1, axis: 8}
        mesh = jax.make_mesh(
            tuple(sizes.values()),
            tuple(sizes),
            axis_types=(AxisType.Auto,) * 3,
            devices=devices(name, 8),
        )
        attend = over_mesh(kernel_of(name), mesh)
        step, (params, state, tokens) = training({"attend": attend, "head_size": 64}, 1024, 4, 16)
        names = decoder.axes(Decoder(llama(50304, 4, 768, 16, 16, 3072, tied=True, head_size=64)))
        args = placed(params, state, tokens, names, mesh)
        program = jax.jit(step).lower(*args).compile()
        counts = Counter(COLLECTIVE.findall(program.as_text()))
        peak = program.memory_analysis().peak_memory_in_bytes
        yield {
            "device": f"8x{name}",
            "split": axis,
            "peak_bytes": peak,
            "collectives": dict(counts),
        }


def placed(params: Any, state: Any, tokens: Any, names: Any, mesh: Any) -> tuple:
    """The arguments of a step where they live: moments as the parameters of their shape."""
    where, _ = shardings(names, params, mesh)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(where), strict=True)
    by_shape, whole = {x.shape: s for x, s in pairs}, NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return (
        jax.tree.map(with_sharding, params, where),
        jax.tree.map(lambda x: with_sharding(x, by_shape.get(x.shape, whole)), state),
        with_sharding(tokens, rows),
    )


def with_sharding(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def check_meshes(rows: Sequence[dict[str, Any]]) -> None:
    """AssertionError for a collective that the split does not need, or that is missing."""
    for row in rows:
        found = set(row["collectives"])
        assert found == EXPECTED[row["split"]], row
