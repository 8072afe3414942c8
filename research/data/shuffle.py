"""Order as a function of (seed, epoch, index): no history, so any batch can be rebuilt alone.

The order of an epoch sorts the raw output of the counter-based generator Philox (Salmon et al.
2011), keyed with seed and epoch. NumPy fixes that output for all versions, which it does not for
`Generator.permutation`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

MASK = (1 << 64) - 1


def raw(seed: int, stream: int, count: int, offset: int = 0) -> np.ndarray:
    """[count] uint64: outputs offset, offset + 1, ... of the generator keyed (seed, stream)."""
    generator = np.random.Philox(key=np.array([seed & MASK, stream & MASK], np.uint64))
    generator.advance(offset // 4)  # a counter step makes four numbers
    skip = offset % 4
    return generator.random_raw(skip + count)[skip:]


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` items in an epoch, [count] int64; read-only."""
    order = np.argsort(raw(seed, epoch, count), kind="stable")
    order.flags.writeable = False
    return order


def item(seed: int, index: int, count: int) -> int:
    """The item at place `index` (from 0, epochs one after another) of the endless order."""
    epoch, place = divmod(index, count)
    return int(permutation(seed, epoch, count)[place])


def batch_items(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """The items of batch `step`, [batch_size] int64. An epoch may end inside a batch: every item
    comes exactly once an epoch whatever the batch size."""
    first = step * batch_size
    return np.array([item(seed, first + i, count) for i in range(batch_size)], np.int64)
