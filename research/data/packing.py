"""Examples as rows of one length: packed several to a row, or padded one to a row.

A row is told apart by `segment_ids` (1, 2, ...; 0 is padding), which attention keeps separate, and
`positions` count from 0 within each segment; so a packed row means what its examples mean alone
(Krell et al. 2021, "Efficient sequence packing without cross-contamination").

Packing is best-fit decreasing within a window: of `window` examples at a time, the longest first,
each goes to the fullest row that still has room. Within a row the data set's order is kept.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

from research.data.supervised import Example

FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")
Table = dict[str, np.ndarray]  # name -> [R, T]


def pack(examples: Sequence[Example], length: int, window: int = 4096, pad_id: int = 0) -> Table:
    """Rows [R, length] of every field in FIELDS, each holding as many examples as fit.

    Raises ValueError when an example is longer than `length`: truncation was decided before.
    """
    _check(examples, length)
    rows: list[list[int]] = []
    for first in range(0, len(examples), window):
        indices = range(first, min(first + window, len(examples)))
        rows += best_fit([len(examples[i].tokens) for i in indices], length, first)
    return fill([[examples[i] for i in row] for row in rows], length, pad_id)


def pad(examples: Sequence[Example], length: int, pad_id: int = 0) -> Table:
    """Rows [R, length] with one example each, padded on the right."""
    _check(examples, length)
    return fill([[example] for example in examples], length, pad_id)


def best_fit(lengths: Sequence[int], capacity: int, first: int = 0) -> list[list[int]]:
    """Indices (counted from `first`) grouped so that each group's lengths sum to <= capacity."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(first + index)
        insort(room, (left - lengths[index], row))
    return [sorted(row) for row in rows]


def fill(rows: Sequence[Sequence[Example]], length: int, pad_id: int = 0) -> Table:
    """Write each row's examples one after another."""
    shape = (len(rows), length)
    table = {name: np.zeros(shape, np.int32) for name in FIELDS}
    table["weights"] = np.zeros(shape, np.float32)
    table["tokens"] += pad_id
    table["targets"] += pad_id
    for r, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            part = (r, slice(start, start + len(example.tokens)))
            for name, values in example._asdict().items():
                table[name][part] = values
            table["segment_ids"][part] = segment
            table["positions"][part] = np.arange(len(example.tokens))
            start += len(example.tokens)
    return table


def fill_ratio(table: Table) -> float:
    """The part of all positions that holds a token, in (0, 1]."""
    return float((table["segment_ids"] != 0).mean())


def batches(table: Table, rows: int) -> Iterator[Table]:
    """All rows in order, `rows` at a time, the last batch filled up with rows of padding."""
    count = len(table["tokens"])
    for first in range(0, count, rows):
        missing = max(first + rows - count, 0)
        yield {
            name: np.pad(values[first : first + rows], ((0, missing), (0, 0)))
            for name, values in table.items()
        }


def unpack(table: Table) -> list[Example]:
    """The examples of all rows, in the order of rows and segments: the inverse of packing."""
    found = []
    for r in range(len(table["tokens"])):
        segments = table["segment_ids"][r]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            found.append(Example(*(table[name][r][here] for name in Example._fields)))
    return found


def stream_row(
    stream: np.ndarray, index: int, length: int, end_id: int | None = None
) -> dict[str, np.ndarray]:
    """Window `index` of a long stream of tokens, each field [length].

    Every target is the stream's next token, the last one's in the next window. With `end_id` (the
    token that ends a document) documents are segments of their own and no label crosses from one
    to the next; without it the window is one segment, and all weights are 1.
    """
    tokens = np.asarray(stream[index * length : index * length + length + 1], np.int32)
    if len(tokens) != length + 1:
        raise IndexError(
            f"window {index} of {windows(len(stream), length)} in {len(stream)} tokens"
        )
    tokens, targets = tokens[:-1], tokens[1:]
    ends = np.zeros(length, bool) if end_id is None else tokens == end_id
    segments = np.cumsum(np.concatenate([[False], ends[:-1]])) + 1
    starts = np.flatnonzero(np.diff(segments, prepend=0))
    positions = np.arange(length) - starts[segments - 1]
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": 1 - ends.astype(np.float32),
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


def windows(tokens: int, length: int) -> int:
    """How many whole windows a stream has, each token of which has a next one."""
    return max(tokens - 1, 0) // length


def _check(examples: Sequence[Example], length: int) -> None:
    if not len(examples):
        raise ValueError("empty data set: there are no examples to pack")
    for index, example in enumerate(examples):
        if len(example.tokens) > length:
            raise ValueError(
                f"example {index} has {len(example.tokens)} tokens, more than the row's {length}"
            )
