"""What keeping optimizer state in the host's memory costs a step.

    .venv/bin/python -m scripts.bench_paged [--size 2000000] [--steps 20]

Prints, for AdamW with float32 and with 8-bit moments, plain and paged: the bytes of state on the device and on
the host, and the median milliseconds of an update of one leaf. On the CPU backend both memories are
the same one, and the difference is that of copying.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from research.train.optim import AdamW, AdamW8bit, Config, Paged, optimizer
from research.train.paged import KIND


def held(state) -> tuple[int, int]:
    """(bytes on the device, bytes on the host)."""
    sizes = {True: 0, False: 0}
    for leaf in jax.tree.leaves(state):
        sizes[leaf.sharding.memory_kind == KIND] += leaf.nbytes
    return sizes[False], sizes[True]


def measure(config: Config, size: int, steps: int) -> tuple[int, int, float]:
    """(bytes on the device, on the host, median seconds of an update)."""
    tree = {"kernel": jnp.ones((size // 1000, 1000))}
    update = optimizer(config, tree)
    state = jax.jit(update.init)(tree)
    move = jax.jit(lambda grads, state: update.update(grads, state, tree), donate_argnums=1)
    seconds = []
    for step in range(steps + 1):
        started = time.perf_counter()
        _, state = jax.block_until_ready(move(tree, state))
        if step:  # the first one compiles
            seconds.append(time.perf_counter() - started)
    return *held(state), float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    for name, inner in {"AdamW": AdamW(), "AdamW8bit": AdamW8bit()}.items():
        for label, config in {name: inner, f"{name}, paged": Paged(inner)}.items():
            device, host, seconds = measure(config, args.size, args.steps)
            print(f"{label:18} device {device:>10,} B  host {host:>10,} B  {seconds * 1e3:8.2f} ms")


if __name__ == "__main__":
    main()
