"""What the machine allows: a large float32 matrix product, and reading memory.

    python -m scripts.benchmark.limits [THREADS]      prints {"matmul_gflop_s", "read_gb_s", "copy_gb_s"}

The best of several tries each, for a limit is what nothing disturbed. Memory is read by numpy's
sum of 32-bit words through as many threads as are allowed, as decoding reads the weights; a copy
counts what is read and what is written.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from scripts.benchmark.worker import seconds

SIDE = 2048
WORDS = 1 << 27  # 512 MB, far beyond any cache


def measure(threads: int, side: int = SIDE, words: int = WORDS, tries: int = 5) -> dict[str, float]:
    """GFLOP/s and GB/s (10^9 bytes) with `threads` threads; BLAS has its own count of them."""
    return {"matmul_gflop_s": matmul(side, tries), **memory(threads, words, tries)}


def matmul(side: int, tries: int) -> float:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    out = np.empty_like(a)
    best = min(seconds(lambda: np.matmul(a, b, out=out)) for _ in range(tries + 1))
    return 2 * side**3 / best / 1e9


def memory(threads: int, words: int, tries: int) -> dict[str, float]:
    source, target = np.ones(words, np.float32), np.zeros(words, np.float32)
    parts = [slice(i * words // threads, (i + 1) * words // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def everywhere(work) -> float:
            return min(seconds(lambda: list(pool.map(work, parts))) for _ in range(tries + 1))

        # bitwise_or of integers is one instruction a vector: only memory can be slow.
        read = everywhere(lambda part: np.bitwise_or.reduce(source.view(np.uint32)[part]))
        copy = everywhere(lambda part: np.copyto(target[part], source[part]))
    return {
        "read_gb_s": source.nbytes / read / 1e9,
        "copy_gb_s": 2 * source.nbytes / copy / 1e9,
    }


if __name__ == "__main__":
    chosen = int(sys.argv[1]) if len(sys.argv) > 1 else len(os.sched_getaffinity(0))
    print(json.dumps(measure(chosen)))
