"""A CPU's attention kernels timed side by side, and PyTorch's where it is installed.

    python -m scripts.bench_attention [--shapes 4,256,9,3,64 ...] [--kernels native blockwise] [--json FILE]

Float32 and causal. One call of each kernel in turn, many turns: a machine that slows down slows all
of them, so read the ratios. A pause comes before each, for threads that wait for work keep a core busy
for a while. `busy` is processor time over wall time of the first kernel, 2.0 when two cores work
throughout. The plain form (`reference`) of 8,192 tokens takes more than 12 GB. PyTorch runs in a process of
its own under `.references/venv`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import jax

from research.kernels.attend import Attend
from research.kernels.mask import Mask
from research.kernels.select import kernel

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ["4,256,9,3,64", "8,512,9,3,64", "1,1024,9,3,64", "1,2048,8,8,64"]
KERNELS = "native", "blockwise", "reference"
PAUSE_S = 0.3
TORCH_PYTHON = ROOT / ".references" / "venv" / "bin" / "python"


class Torch:
    """PyTorch's attention in another process: a line with a job in, a line with seconds out."""

    def __init__(self, python: Path):
        script = str(ROOT / "scripts" / "bench_attention_torch.py")
        # -P: beside the script is a `profile`, which the standard library has too.
        self.process = subprocess.Popen(
            [str(python), "-P", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, shape: tuple[int, ...], backward: bool) -> float:
        time.sleep(PAUSE_S)
        self.process.stdin.write(json.dumps({"shape": shape, "backward": backward}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the PyTorch process ended; its message is above")
        return json.loads(line)["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compiled(attend: Attend, shape: tuple[int, ...], backward: bool):
    """A function without arguments that runs the kernel, compiled and warm; and its memory."""
    B, T, N, K, H = shape
    sizes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    keys = jax.random.split(jax.random.key(0), 4)
    operands = [jax.random.normal(k, size) for k, size in zip(keys, sizes, strict=True)]

    def forward(q, k, v, weights):
        return attend(q, k, v, Mask())

    def both(q, k, v, weights):
        return jax.value_and_grad(lambda *x: (forward(*x, None) * weights).sum(), (0, 1, 2))(
            q, k, v
        )

    run = jax.jit(both if backward else forward).lower(*operands).compile()
    jax.block_until_ready(run(*operands))
    memory = run.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(run(*operands)), memory


def timed(run) -> tuple[float, float]:
    """(wall seconds, processor seconds) of one call, after a pause."""
    time.sleep(PAUSE_S)
    wall, busy = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - busy


def measure(
    names: list[str], shape: tuple[int, ...], backward: bool, repeats: int, torch: Torch | None
) -> dict:
    """One row: medians in milliseconds, ratios, temporary memory in MB."""
    runs, memory = {}, {}
    for name in names:
        runs[name], memory[name] = compiled(kernel(name), shape, backward)
    wall: dict[str, list[float]] = {name: [] for name in names} | ({"torch": []} if torch else {})
    busy = []
    for _ in range(repeats):
        for name in names:
            seconds, processor = timed(runs[name])
            wall[name].append(seconds)
            if name == names[0]:
                busy.append(processor / seconds)
        if torch is not None:
            wall["torch"].append(torch(shape, backward))
    row = {"shape": "x".join(map(str, shape)), "pass": "fwd+bwd" if backward else "fwd"}
    row |= {f"{name}_ms": 1e3 * median(times) for name, times in wall.items()}
    row |= {f"{name}_MB": memory[name] / 1e6 for name in names}
    pairs = [(names[0], other) for other in names[1:]]
    pairs += [(name, "torch") for name in names if torch is not None]
    for ours, theirs in pairs:
        turns = zip(wall[ours], wall[theirs], strict=True)
        row[f"{ours}/{theirs}"] = median(x / y for x, y in turns)
    return row | {"busy": median(busy)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_attention", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,T,N,K,H")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    torch = Torch(TORCH_PYTHON) if os.access(TORCH_PYTHON, os.X_OK) else None
    if torch is None:
        print(f"no {TORCH_PYTHON}: PyTorch is left out", file=sys.stderr)
    try:
        for text in args.shapes:
            for backward in (False, True):
                shape = tuple(map(int, text.split(",")))
                row = measure(args.kernels, shape, backward, args.repeats, torch)
                print(
                    "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else v for k, v in row.items())
                )
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    finally:
        if torch is not None:
            torch.close()


if __name__ == "__main__":
    main()
