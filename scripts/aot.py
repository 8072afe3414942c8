"""Compiles attention kernels and training steps for GPUs that are not here, and reads what came out.

    bash scripts/aot.sh [--devices h100 a100] [--parts kernels step mesh] [--output FILE]

kernels   each Pallas kernel by head size, plain and with every feature: registers, spilled bytes, shared
          memory, tensor core instructions. AssertionError where a default tile of 16-bit inputs spills,
          takes more shared memory than the device has, or misses the tensor cores.
step      a training step (12 layers, width 768, 8 rows of T) by kernel: the compiler's peak memory, and
          that it grows with T and not with T².
mesh      FSDP and tensor-parallel steps for 8 devices: which collectives, and no others.

No times: nothing runs. Rows go to FILE as JSON, tables to the terminal.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from experiments.shared.cells import markdown
from research.kernels.attend import Attend, reference
from research.kernels.flash1 import flash1
from research.kernels.flash2 import flash2
from research.kernels.flash_decode import flash_decode
from research.kernels.flash_tiles import FlashTiles, flash_tiles
from research.kernels.mask import Mask
from research.kernels.sharded import over_mesh
from research.models import decoder
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.train.sharding import shardings

TARGETS = Path(__file__).parent / "targets"
SHARED = {"h100": 232448, "a100": 166912}  # bytes a program may have
TENSOR_CORES = {"h100": r"wgmma\.mma_async|mma\.sync", "a100": r"mma\.sync"}
# FSDP gathers parameters and scatters gradients; rows of the table, split along `embed`, are looked up
# where they lie and exchanged. Tensor parallelism sums what each device has of a result.
EXPECTED = {"fsdp": {"all-gather", "reduce-scatter", "all-to-all"}, "tensor": {"all-reduce"}}
COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def devices(name: str, count: int = 1) -> Sequence[Any]:
    """So many devices of a kind, as the compiler sees them."""
    config = (TARGETS / f"{name}.txtpb").read_text()
    return topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=config, topology=f"1x1x{count}"
    ).devices


# Kernels.


def kernel_rows(name: str, heads: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row for each kernel of each way of calling it."""
    device = devices(name)[0]
    for H in heads:
        tiles = flash_tiles(H, jnp.bfloat16, device.device_kind)
        for case, function, args in cases(H, tiles):
            with tempfile.TemporaryDirectory() as dump:
                compiled(function, args, SingleDeviceSharding(device), dump)
                for row in resources(Path(dump), name):
                    yield {"device": name, "head": H, "case": case, **row}


def cases(H: int, tiles: FlashTiles) -> Iterator[tuple[str, Callable, tuple]]:
    B, T, N, K = 2, 2048, 8, 4
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K))
    ids, rng = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.eval_shape(jax.random.key, 0)
    small = (
        jax.ShapeDtypeStruct((N,), jnp.float32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
        ids,
        rng,
    )

    def plain(kernel: Attend) -> Callable:
        return gradient(lambda q, k, v: kernel(q, k, v, Mask(), tiles=tiles, interpret=False))

    def everything(q, k, v, slopes, prefix, ids, rng):
        mask = Mask(window=900, prefix=prefix, slopes=slopes, query_segments=ids, key_segments=ids)
        return flash2(q, k, v, mask, None, (0.1, rng), 30.0, tiles=tiles, interpret=False)

    yield "flash2", plain(flash2), (q, k, k)
    yield "flash2, every feature", gradient(everything), (q, k, k, *small)
    yield "flash1", plain(flash1), (q, k, k)
    exact = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, k)]
    full = gradient(lambda q, k, v: flash2(q, k, v, Mask(), interpret=False))
    yield "flash2, float32", full, exact
    one = jax.ShapeDtypeStruct((B, 1, N, H), jnp.bfloat16)
    offset = jax.ShapeDtypeStruct((), jnp.int32)
    decode = partial(flash_decode, interpret=False)
    yield "decode", lambda q, k, v, at: decode(q, k, v, Mask(offset=at)), (one, k, k, offset)


def gradient(attend: Callable) -> Callable:
    return jax.grad(lambda *args: attend(*args).astype(jnp.float32).sum(), (0, 1, 2))


def compiled(function: Callable, args: Any, sharding: Any, dump: str | None = None) -> Any:
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    args = jax.tree.map(place, args)
    options = {} if dump is None else {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
    return jax.jit(function).lower(*args).compile(compiler_options=options)


def resources(dump: Path, device: str) -> Iterator[dict[str, Any]]:
    """Of every Pallas kernel in a dump: what ptxas and XLA say of it."""
    launched = {}
    for path in dump.glob("*thunk_sequence.txt"):
        for line in path.read_text().splitlines():
            found = re.search(r"(flash\w+) grid: .*threads: \[(\d+).*shared_memory: (\d+)", line)
            if found:
                launched[found[1]] = int(found[2]) // 32, int(found[3])
    for path in sorted(dump.glob("*.ptx")):
        text = path.read_text()
        name = re.search(r"\.entry (flash\w+)\(", text)
        if name:
            warps, shared = launched[name[1]]
            registers, spilled = assembled(path, "sm_90a" if device == "h100" else "sm_80")
            yield {
                "kernel": name[1],
                "warps": warps,
                "registers": registers,
                "spilled_bytes": spilled,
                "shared_bytes": shared,
                "tensor_core_instructions": len(re.findall(TENSOR_CORES[device], text)),
                "asynchronous_copies": len(re.findall(r"cp\.async\.c[ag]", text)),
            }


def assembled(ptx: Path, target: str) -> tuple[int, int]:
    """(registers a thread, bytes spilled) by ptxas."""
    ptxas = next(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/bin/ptxas"))
    command = [str(ptxas), "-v", "--gpu-name", target, str(ptx), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return int(re.search(r"Used (\d+) registers", said)[1]), sum(map(int, spills))


def check_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """AssertionError naming the kernel that breaks a limit. FlashAttention-1 may spill: nothing chooses
    it, and its loop was not made for registers."""
    for row in rows:
        where = f"{row['kernel']} ({row['case']}) of {row['device']}, heads of {row['head']}"
        assert row["shared_bytes"] <= SHARED[row["device"]], f"{where}: too much shared memory"
        exact = row["case"].endswith("float32")  # not rounded for tensor cores
        assert exact or row["tensor_core_instructions"] > 0, f"{where}: no tensor cores"
        if row["case"] in ("flash2", "flash2, float32", "decode"):
            assert row["spilled_bytes"] == 0, f"{where}: spills {row['spilled_bytes']} bytes"


# Training steps.


def step_rows(name: str, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Peak memory of a step of GPT-2's size in LLaMA's form, by kernel and T; 8 rows."""
    sharding = SingleDeviceSharding(devices(name)[0])
    kinds = {
        "reference": {"attend": reference},
        "flash2": {"attend": partial(flash2, interpret=False)},
        "flash2, layers again": {"attend": partial(flash2, interpret=False), "remat": "full"},
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


# Meshes.


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
        attend = over_mesh(partial(flash2, interpret=False), mesh)
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


PARTS = {
    "kernels": (lambda name: kernel_rows(name, (64, 128, 256)), check_kernels),
    "step": (lambda name: step_rows(name, (1024, 2048, 4096)), check_steps),
    "mesh": (mesh_rows, check_meshes),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: registers / spilled bytes / shared kB by kernel and device; GB of steps."""
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["part"] == "kernels":
            key = row["case"], row["kernel"], str(row["head"])
            shared = row["shared_bytes"] / 1000
            text = f"{row['registers']} / {row['spilled_bytes']} / {shared:.0f}"
        elif row["part"] == "step":
            key = "step", row["kind"], str(row["length"])
            text = f"{row['peak_bytes'] / 2**30:.1f} GiB"
        else:
            key = "mesh", row["split"], "8 devices"
            text = ", ".join(f"{n} {name}" for name, n in sorted(row["collectives"].items()))
        cells.setdefault(key, {})[row["device"].removeprefix("8x")] = text
    names = sorted({name for found in cells.values() for name in found})
    lines = [[*key, *(found.get(name, "") for name in names)] for key, found in cells.items()]
    return markdown(["case", "kernel", "head or length", *names], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--table", type=Path, metavar="FILE", help="only show the rows of FILE")
    parser.add_argument("--output", type=Path, help="JSON lines, written anew")
    options = parser.parse_args(arguments)
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    rows = []
    for part in options.parts:
        make, check = PARTS[part]
        for name in options.devices:
            mine = []
            for row in make(name):
                print(json.dumps(row), flush=True)
                mine.append(row)
            check(mine)
            rows += [{"part": part, **row} for row in mine]
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
