"""Pairs of texts as rows for an encoder–decoder: the source beside the target, several to a row.

Source and target of a pair have the same segment id, so that a packed row means what its pairs mean
alone. The source is its ids and an end; the target's tokens are a beginning and its ids, its
targets the ids and an end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.data.packing import Table, best_fit, fill
from research.data.supervised import Example


class Pair(NamedTuple):
    """Token ids of a source and of its translation, without beginnings and ends."""

    source: Sequence[int]
    target: Sequence[int]


def pack_pairs(
    pairs: Sequence[Pair], length: int, bos_id: int, eos_id: int, pad_id: int = 0
) -> Table:
    """Rows [R, length] of as many pairs as fit: the fields of `packing.pack` for the target, and
    source, source_segment_ids, source_positions.

    Both sides have room for `length` tokens. ValueError for a pair that has more on one of them, or
    when there are none.
    """
    if not len(pairs):
        raise ValueError("empty data set: there are no pairs to pack")
    sizes = [1 + max(len(pair.source), len(pair.target)) for pair in pairs]
    longest = max(sizes)
    if longest > length:
        raise ValueError(
            f"pair {sizes.index(longest)} has {longest} tokens, an end included, more than the "
            f"row's {length}"
        )
    rows = best_fit(sizes, length)
    sources = [_source(pair, eos_id) for pair in pairs]
    targets = [_target(pair, bos_id, eos_id) for pair in pairs]
    source = fill([[sources[i] for i in row] for row in rows], length, pad_id)
    target = fill([[targets[i] for i in row] for row in rows], length, pad_id)
    return target | {
        "source": source["tokens"],
        "source_segment_ids": source["segment_ids"],
        "source_positions": source["positions"],
    }


def _source(pair: Pair, eos_id: int) -> Example:
    ids = np.asarray([*pair.source, eos_id], np.int32)
    return Example(ids, ids, np.zeros(len(ids), np.float32))


def _target(pair: Pair, bos_id: int, eos_id: int) -> Example:
    ids = np.asarray([bos_id, *pair.target, eos_id], np.int32)
    return Example(ids[:-1], ids[1:], np.ones(len(ids) - 1, np.float32))
