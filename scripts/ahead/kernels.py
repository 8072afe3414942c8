"""The Pallas kernels for devices that are not here: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from research.kernels.attend import Attend
from research.kernels.flash1 import flash1, flash1_tiles
from research.kernels.flash2 import flash2
from research.kernels.flash_decode import MOST_ROWS, flash_decode
from research.kernels.flash_tiles import FlashTiles, flash_tiles
from research.kernels.mask import Mask
from scripts.ahead.target import compiled, devices

SHARED = {"h100": 232448, "a100": 166912}  # bytes a program may have
TENSOR_CORES = r"wgmma\.mma_async|mma\.sync"
FLASH2 = {"flash2_forward", "flash2_queries", "flash2_keys"}
KERNELS = {  # of each case
    "flash2": FLASH2,
    "flash2, every feature": FLASH2,
    "flash2, float32": FLASH2,
    "flash1": {"flash1_forward", "flash1_backward"},
    "decode": {"flash_decode"},
    "decode, 16 queries": {"flash_decode"},
}


def kernel_rows(name: str, heads: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row for each kernel of each way of calling it."""
    device = devices(name)[0]
    for H in heads:
        tiles = flash_tiles(H, jnp.bfloat16, device.device_kind)
        older = flash1_tiles(H, jnp.bfloat16, device.device_kind)
        for case, function, args in cases(H, tiles, older):
            with tempfile.TemporaryDirectory() as dump:
                compiled(function, args, SingleDeviceSharding(device), dump)
                for row in resources(Path(dump), name):
                    yield {"device": name, "head": H, "case": case, **row}


def cases(H: int, tiles: FlashTiles, older: FlashTiles) -> Iterator[tuple[str, Callable, tuple]]:
    B, T, N, K = 2, 2048, 8, 4
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K))
    ids, rng = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.eval_shape(jax.random.key, 0)
    small = (
        jax.ShapeDtypeStruct((N,), jnp.float32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
        ids,
        rng,
    )

    def plain(kernel: Attend, tiles: FlashTiles) -> Callable:
        return gradient(lambda q, k, v: kernel(q, k, v, Mask(), tiles=tiles, interpret=False))

    def everything(q, k, v, slopes, prefix, ids, rng):
        mask = Mask(window=900, prefix=prefix, slopes=slopes, query_segments=ids, key_segments=ids)
        return flash2(q, k, v, mask, None, (0.1, rng), 30.0, tiles=tiles, interpret=False)

    yield "flash2", plain(flash2, tiles), (q, k, k)
    yield "flash2, every feature", gradient(everything), (q, k, k, *small)
    yield "flash1", plain(flash1, older), (q, k, k)
    exact = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, k)]
    full = gradient(lambda q, k, v: flash2(q, k, v, Mask(), interpret=False))
    yield "flash2, float32", full, exact
    one = jax.ShapeDtypeStruct((B, 1, N, H), jnp.bfloat16)
    offset = jax.ShapeDtypeStruct((), jnp.int32)
    decode = partial(flash_decode, interpret=False)
    yield "decode", lambda q, k, v, at: decode(q, k, v, Mask(offset=at)), (one, k, k, offset)
    many = jax.ShapeDtypeStruct((B, 16, K * MOST_ROWS // 16, H), jnp.bfloat16)

    def segmented(q, k, v, at, ids):
        mask = Mask(offset=at, query_segments=ids[:, :16], key_segments=ids)
        return decode(q, k, v, mask)

    yield "decode, 16 queries", segmented, (many, k, k, offset, ids)


def gradient(attend: Callable) -> Callable:
    return jax.grad(lambda *args: attend(*args).astype(jnp.float32).sum(), (0, 1, 2))


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
                "tensor_core_instructions": len(re.findall(TENSOR_CORES, text)),
                "of_them_wgmma": len(re.findall(r"wgmma\.mma_async", text)),
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
    for key in {(row["device"], row["head"], row["case"]) for row in rows}:
        found = {r["kernel"] for r in rows if (r["device"], r["head"], r["case"]) == key}
        assert found == KERNELS[key[2]], f"{key}: compiled {found}, expected {KERNELS[key[2]]}"
    for row in rows:
        where = f"{row['kernel']} ({row['case']}) of {row['device']}, heads of {row['head']}"
        assert row["shared_bytes"] <= SHARED[row["device"]], f"{where}: too much shared memory"
        exact = row["case"].endswith("float32")  # not rounded for tensor cores
        assert exact or row["tensor_core_instructions"] > 0, f"{where}: no tensor cores"
        if row["case"] in ("flash2", "flash2, float32", "decode", "decode, 16 queries"):
            assert row["spilled_bytes"] == 0, f"{where}: spills {row['spilled_bytes']} bytes"
