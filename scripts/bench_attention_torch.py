"""The PyTorch half of bench_attention.py: jobs as JSON lines on stdin, seconds on stdout.

Runs under the reference environment, and imports nothing of this project.
"""

import functools
import json
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention


@functools.cache
def operands(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """q, k, v and a weight for the result, [B, T, heads, H] as a projection leaves them."""
    B, T, N, K, H = shape
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, heads, H, generator=generator) for heads in (N, K, K, N)]


def run(shape: tuple[int, ...], backward: bool) -> None:
    q, k, v, weights = (x.detach().requires_grad_(backward) for x in operands(shape))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape[2] != shape[3])
    out = out.transpose(1, 2).contiguous()
    if backward:
        (out * weights.detach()).sum().backward()


def main() -> None:
    warm = set()
    for line in sys.stdin:
        job = json.loads(line)
        shape, backward = tuple(job["shape"]), job["backward"]
        if (shape, backward) not in warm:
            run(shape, backward)
            warm.add((shape, backward))
        start = time.perf_counter()
        run(shape, backward)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
