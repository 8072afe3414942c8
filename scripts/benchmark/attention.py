"""Attention kernels on this device: first whether they are right, then how fast.

    python -m scripts.bench attention --impl flash2,flash1,cudnn,xla [--tune] [--output FILE]
    python -m scripts.bench attention --impl native,blockwise,reference --quick        on a CPU

Every head size and every tile that is timed passes `scripts/benchmark/gate.py` first. Then tokens are kept
at 16k a call while T grows. FLOPs are those of FlashAttention's papers: 4·B·N·T²·H forward, half of it when
causal, 2.5 times as much backward. On a GPU one query on a long cache is timed too, whose measure is the
GB of cache read in a second. All programs are compiled before any is timed, several at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from experiments.shared.cells import markdown
from research.kernels.attend import Attend
from research.kernels.cudnn import cudnn
from research.kernels.flash_tiles import flash_tiles
from research.kernels.mask import Mask
from research.kernels.select import kernel
from research.kernels.triton import Tile
from research.runs import environment
from scripts.benchmark.gate import both, exact, exact_decode, gate, inputs

# Dense bfloat16 TFLOP/s of the tensor cores, by the makers' data sheets.
PEAK = {"H100 80GB HBM3": 989, "H200": 989, "A100": 312}
HEADS = (64, 128)
PLAIN_BYTES = 4e9  # of float32 scores, beyond which 'xla' is left out
CALLS, ENOUGH_S = 5, 0.5  # of a repetition, and of all repetitions of one program
CACHES = (1024, 8192, 32768)
STEPS = 20  # of decoding, one after the other in one program
# Tiles to try for each of flash2's kernels.
CANDIDATES = {
    "forward": "128,64,8,2 64,64,4,2 64,64,4,3 128,64,8,3 128,64,4,2 128,128,8,2 128,32,4,3 64,128,4,2",
    "queries": "64,64,4,2 128,64,8,2 64,64,4,3 64,32,4,2 128,32,8,2",
    "keys": "64,64,4,2 32,64,4,2 64,128,8,2 32,128,8,2 32,64,4,3",
}
Timed = float | Exception


def named(name: str) -> Attend:
    """A kernel of `research.kernels.select`, or 'xla': JAX's own plain form."""
    return partial(cudnn, implementation="xla") if name == "xla" else kernel(name)


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

    @property
    def score_bytes(self) -> float:
        B, T, N, _, _ = self.sizes
        return 4.0 * B * N * T * T

    def program(self, attend: Attend) -> Callable:
        mask = Mask(causal=self.causal)
        forward = jax.jit(lambda q, k, v, w: attend(q, k, v, mask))
        return both(attend, mask) if self.backward else forward

    def arrays(self, dtype: Any) -> list:
        return inputs(*self.sizes, dtype)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One query of 32 heads on a cache of S keys of 8: LLaMA-3 8B's, for `rows` sequences."""

    S: int
    H: int = 128
    rows: int = 16

    @property
    def bytes(self) -> float:
        return 2 * 2.0 * self.rows * self.S * 8 * self.H

    def program(self, attend: Attend) -> Callable:
        step = partial(attend, mask=Mask(offset=self.S - 1))
        many = lambda q, k, v: jax.lax.fori_loop(0, STEPS, lambda _, q: step(q, k, v), q)  # noqa: E731
        return jax.jit(many)

    def arrays(self, dtype: Any) -> list:
        q, k, v = inputs(self.rows, self.S, 32, 8, self.H, dtype)[:3]
        return [q[:, -1:], k, v]


def seconds(jobs: dict[Any, tuple[Attend, Any]], dtype: Any, repeats: int) -> Iterator[tuple]:
    """(key, seconds of a call or the error) of each job: the median over repetitions of the mean of some
    calls, after one that does not count: a GPU is given the next while it runs one."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        compiling = {
            key: pool.submit(
                lambda attend, work: (
                    work.program(attend)
                    .lower(*jax.eval_shape(partial(work.arrays, dtype)))
                    .compile()
                ),
                *job,
            )
            for key, job in jobs.items()
        }
    for key, (_, work) in jobs.items():
        try:
            yield key, timed(compiling[key].result(), work.arrays(dtype), repeats)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            yield key, error


def timed(run: Callable, x: list, repeats: int) -> float:
    jax.block_until_ready(run(*x))
    start = time.perf_counter()
    jax.block_until_ready(run(*x))
    once, times = time.perf_counter() - start, []
    calls = max(1, min(CALLS, int(ENOUGH_S / repeats / once)))
    for _ in range(max(2, min(repeats, int(ENOUGH_S / calls / once)))):
        start = time.perf_counter()
        for _ in range(calls):
            done = run(*x)
        jax.block_until_ready(done)
        times.append((time.perf_counter() - start) / calls)
    return median(times)


def known(spent: Timed) -> float | None:
    """None where memory did not suffice; any other error is raised."""
    if not isinstance(spent, Exception):
        return spent
    if "RESOURCE_EXHAUSTED" not in str(spent):
        raise spent
    return None


def measure(names: Sequence[str], works: Sequence[Work], dtype: Any, repeats: int) -> Iterator:
    """A row for each work. 'xla' is not run where its scores take more than PLAIN_BYTES."""
    for_each = {
        work: [name for name in names if name != "xla" or work.score_bytes <= PLAIN_BYTES]
        for work in works
    }
    jobs = {(work, n): (named(n), work) for work, chosen in for_each.items() for n in chosen}
    times = {key: known(spent) for key, spent in seconds(jobs, dtype, repeats)}
    for work in works:
        found = {name: times.get((work, name)) for name in names}
        yield row(work, {name: spent for name, spent in found.items() if spent}, dtype)


def row(work: Work, found: dict[str, float], dtype: Any) -> dict[str, Any]:
    """What was not run, or not with this memory, has no number."""
    return {
        **dataclasses.asdict(work),
        "device": jax.devices()[0].device_kind,
        "dtype": jnp.dtype(dtype).name,
        "ms": {name: 1e3 * s for name, s in found.items()},
        "tflops": {name: work.flops / s / 1e12 for name, s in found.items()},
    }


def decoding(names: Sequence[str], dtype: Any, repeats: int) -> Iterator[dict[str, Any]]:
    jobs = {(Decoding(S), name): (kernel(name), Decoding(S)) for S in CACHES for name in names}
    for (work, name), spent in seconds(jobs, dtype, repeats):
        if (several := known(spent)) is None:
            continue
        yield {
            **dataclasses.asdict(work),
            "decode": name,
            "device": jax.devices()[0].device_kind,
            "us": 1e6 * several / STEPS,
            "gb_per_s": work.bytes * STEPS / several / 1e9,
        }


def tuned(H: int, dtype: Any, T: int, tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Times of `flash2` with each candidate for one of its kernels, the others as they are."""
    default, jobs = flash_tiles(H, dtype), {}
    for which, candidates in CANDIDATES.items():
        for tile in (Tile(*map(int, each.split(","))) for each in candidates.split()):
            attend = partial(kernel("flash2"), tiles=dataclasses.replace(default, **{which: tile}))
            jobs[which, tile] = attend, Work(T, H, True, which != "forward", tokens)
    for (which, tile), spent in seconds(jobs, dtype, repeats):
        row = {"H": H, "tuned": which, "tile": dataclasses.astuple(tile)}
        try:
            gate("flash2", jobs[which, tile][0], 512, H)
            if (once := known(spent)) is not None:
                yield row | {"ms": 1e3 * once}
        except (jax.errors.JaxRuntimeError, ValueError, AssertionError) as error:
            yield row | {"error": str(error)[:200]}


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """TFLOP/s, in brackets the share of the device's peak and the ratio to cuDNN where they are known."""
    kind = rows[0]["device"]
    peak = next((p for known, p in PEAK.items() if known in kind), None)

    def cell(row: dict[str, Any], name: str) -> str:
        speed, base = row["tflops"].get(name), row["tflops"].get("cudnn")
        if speed is None:
            return "–"
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


def check(names: Sequence[str], T: int) -> None:
    for name, H in product(names, HEADS):
        worst = gate(name, named(name), T, H)
        print(f"{name}, heads of {H}: right, error {worst:.2f} times the reference's", flush=True)
        if name.startswith("flash"):
            print(f"  in float32 wrong by {exact(name, named(name), T, H):.1g}", flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench attention", description=__doc__.splitlines()[0]
    )
    on_gpu = jax.default_backend() == "gpu"
    add = parser.add_argument
    add("--impl", default="flash2,flash1,cudnn,xla" if on_gpu else "native,blockwise,reference")
    add("--quick", action="store_true", help="short T, few repetitions")
    add("--tune", action="store_true", help="time flash2 with other tiles instead")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    add("--repeats", type=int, default=10)
    add("--output", type=Path, help="append JSON lines to this file")
    options = parser.parse_args(arguments)
    names, dtype = options.impl.split(","), jnp.bfloat16 if on_gpu else jnp.float32
    tokens, width, repeats = (256, 128, 2) if options.quick else (16384, 2048, options.repeats)
    if options.tune:
        write((r for H in HEADS for r in tuned(H, dtype, 4096, tokens, repeats)), options.output)
        return
    check(names, 64 if options.quick else 512)
    lengths = (128, 256) if options.quick else options.lengths
    works = [
        Work(T, H, causal, backward, tokens, width)
        for H, causal, backward, T in product(HEADS, (True, False), (False, True), lengths)
    ]
    rows = write(measure(names, works, dtype, repeats), options.output)
    if on_gpu:
        print(f"decoding in float32 wrong by {exact_decode(kernel('flash_decode'), 1000, 128):.1g}")
        write(decoding(("flash_decode", "reference"), dtype, repeats), options.output)
    print("\n" + table(rows, names))


def write(rows: Iterator[dict[str, Any]], output: Path | None) -> list[dict[str, Any]]:
    """The rows, each printed, and appended to the file as soon as it is known."""
    facts, found = {"versions": environment.versions(), "git": environment.commit()}, []
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
        if output:
            with output.open("a") as file:
                file.write(json.dumps({**row, **facts}) + "\n")
    return found
