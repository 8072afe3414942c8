"""Attention kernels on this device: first whether they are right, then how fast.

    python -m scripts.bench attention --impl flash2,flash1,cudnn,xla [--tune] [--output FILE]
    python -m scripts.bench attention --impl blockwise,reference --quick        on a CPU

The gate: each kernel's values and gradients at a short T, in bfloat16, may be at most 1.5 times as far
from float32 as the reference form in bfloat16 is; a kernel that takes every feature has it with all of
them. Every head size and every tile that is timed passes it first. Then tokens are kept at 16k a call while T grows. FLOPs are those of
FlashAttention's papers: 4·B·N·T²·H forward, half of it when causal, 2.5 times as much backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.cells import markdown
from research.kernels.attend import Attend, reference
from research.kernels.cudnn import cudnn
from research.kernels.flash_tiles import FlashTiles, flash_tiles
from research.kernels.mask import Mask
from research.kernels.select import kernel
from research.kernels.triton import Tile
from research.runs import environment
from research.types import Array

# Dense bfloat16 TFLOP/s of the tensor cores, by the makers' data sheets.
PEAK = {"H100 80GB HBM3": 989, "H200": 989, "A100": 312}
HEADS = (64, 128)
FEATURES = {"flash1", "flash2", "blockwise", "reference"}  # all of the contract
CALLS = 5  # of a repetition
# Forward tiles to try; the first is the default.
CANDIDATES = [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)]


def named(name: str) -> Attend:
    """A kernel of `research.kernels.select`, or 'xla': JAX's own plain form."""
    return partial(cudnn, implementation="xla") if name == "xla" else kernel(name)


def inputs(B: int, T: int, N: int, K: int, H: int, dtype: Any) -> list[Array]:
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def both(attend: Callable, mask: Mask, *more: Any) -> Callable:
    """(q, k, v, weights) -> (out, gradients of a weighted sum)."""

    def loss(q, k, v, weights):
        out = attend(q, k, v, mask, *more)
        return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def gate(name: str, attend: Attend, T: int, H: int) -> float:
    """Largest error in multiples of the reference's in bfloat16; AssertionError above 1.5."""
    dtype = jnp.bfloat16
    x, more = inputs(2, T, 4, 4 if name in ("cudnn", "xla") else 2, H, dtype), ()
    mask = Mask()
    if name in FEATURES:
        ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, T)), axis=1))
        mask = Mask(
            window=T // 2,
            prefix=jnp.array([0, T // 5]),
            query_segments=ids,
            key_segments=ids,
            slopes=2.0 ** -jnp.arange(1, 5),
        )
        more = (None, (0.1, jax.random.key(1)), 20.0)
    with jax.default_matmul_precision("highest"):
        true = both(reference, mask, *more)(*(y.astype(jnp.float32) for y in x))
    allowed, ours = both(reference, mask, *more)(*x), both(attend, mask, *more)(*x)
    worst = max(_error(a, t) / _error(b, t) for a, b, t in _leaves(ours, allowed, true))
    if not worst <= 1.5:
        raise AssertionError(f"{name} is {worst:.2f} times as far from float32 as the reference")
    return worst


def _leaves(*trees: Any) -> Any:
    return zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)


def _error(x: Array, true: Array) -> float:
    return float(jnp.abs(x.astype(jnp.float32) - true).max()) + 1e-6


@dataclasses.dataclass(frozen=True)
class Work:
    T: int
    H: int
    causal: bool
    backward: bool
    tokens: int
    width: int = 2048

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        N = max(1, self.width // self.H)
        return max(1, self.tokens // self.T), self.T, N, N, self.H

    @property
    def flops(self) -> float:
        B, T, N, _, H = self.sizes
        return 4.0 * B * N * T * T * H * (0.5 if self.causal else 1) * (3.5 if self.backward else 1)


def seconds(attend: Attend, work: Work, dtype: Any, repeats: int) -> float:
    """Median over repetitions of the mean of CALLS calls, after one that does not count: a GPU is given
    the next while it runs one. nan where memory does not suffice."""
    x, mask = inputs(*work.sizes, dtype), Mask(causal=work.causal)
    forward = jax.jit(lambda q, k, v, w: attend(q, k, v, mask))
    run, times = both(attend, mask) if work.backward else forward, []
    try:
        jax.block_until_ready(run(*x))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return float("nan")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(CALLS):
            done = run(*x)
        jax.block_until_ready(done)
        times.append((time.perf_counter() - start) / CALLS)
    return median(times)


def measure(names: Sequence[str], work: Work, dtype: Any, repeats: int) -> dict[str, Any]:
    found = {name: seconds(named(name), work, dtype, repeats) for name in names}
    return {
        **dataclasses.asdict(work),
        "device": jax.devices()[0].device_kind,
        "dtype": jnp.dtype(dtype).name,
        "ms": {name: 1e3 * s for name, s in found.items()},
        "tflops": {name: work.flops / s / 1e12 for name, s in found.items()},
    }


def tuned(H: int, dtype: Any, T: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Forward times of `flash2` with each candidate tile that compiles."""
    default, work, rows = flash_tiles(H, dtype), Work(T, H, True, False, tokens), []
    for tile in CANDIDATES:
        tiles = FlashTiles(tile, default.queries, default.keys)
        attend = partial(kernel("flash2"), tiles=tiles)
        try:
            gate("flash2", attend, 512, H)
            spent = seconds(attend, work, dtype, repeats)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            rows.append({"H": H, "tile": dataclasses.asdict(tile), "error": str(error)[:200]})
            continue
        rows.append({"H": H, "tile": dataclasses.asdict(tile), "ms": 1e3 * spent})
    return rows


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """TFLOP/s, in brackets the share of the device's peak and the ratio to cuDNN where they are known."""
    kind = rows[0]["device"]
    peak = next((p for known, p in PEAK.items() if known in kind), None)

    def cell(row: dict[str, Any], name: str) -> str:
        speed, base = row["tflops"][name], row["tflops"].get("cudnn")
        notes = [f"{100 * speed / peak:.0f} %"] if peak else []
        notes += [f"{speed / base:.2f} of cuDNN"] if base and name != "cudnn" else []
        return f"{speed:.3g}" + (f" ({', '.join(notes)})" if notes else "")

    lines = [
        [
            str(row["T"]),
            str(row["H"]),
            "causal" if row["causal"] else "full",
            "forward and backward" if row["backward"] else "forward",
            *(cell(row, name) for name in names),
        ]
        for row in rows
    ]
    return f"TFLOP/s on {kind}\n\n" + markdown(["T", "head", "mask", "pass", *names], lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench attention", description=__doc__.splitlines()[0]
    )
    on_gpu = jax.default_backend() == "gpu"
    add = parser.add_argument
    add("--impl", default="flash2,flash1,cudnn,xla" if on_gpu else "blockwise,reference")
    add("--quick", action="store_true", help="short T, few repetitions")
    add("--tune", action="store_true", help="time flash2's tiles that do not spill, too")
    add("--repeats", type=int, default=10)
    add("--output", type=Path, help="append JSON lines to this file")
    options = parser.parse_args(arguments)
    names, dtype = options.impl.split(","), jnp.bfloat16 if on_gpu else jnp.float32
    for name, H in product(names, HEADS):
        worst = gate(name, named(name), 64 if options.quick else 512, H)
        print(f"{name}, heads of {H}: right, error {worst:.2f} times the reference's", flush=True)
    lengths = (128, 256) if options.quick else (512, 1024, 2048, 4096, 8192, 16384)
    tokens, width = (256, 128) if options.quick else (16384, 2048)
    rows = []
    for H, causal, backward, T in product(HEADS, (True, False), (False, True), lengths):
        work = Work(T, H, causal, backward, tokens, width)
        rows.append(measure(names, work, dtype, 2 if options.quick else options.repeats))
        print(json.dumps(rows[-1]), flush=True)
    print("\n" + table(rows, names))
    if options.tune:
        rows += [r for H in HEADS for r in tuned(H, dtype, lengths[-1], tokens, options.repeats)]
    if options.output:
        facts = {"versions": environment.versions(), "git": environment.commit()}
        with options.output.open("a") as file:
            file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)
