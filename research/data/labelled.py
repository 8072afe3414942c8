"""Labelled examples as rows of one length, for `classify`, `regress` and `choose`.

Tables go into `source.supervised_source` like packed ones; a weight belongs to an example here, not
to a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.packing import Table


def rows(sequences: Sequence[Sequence[int]], labels: Any, length: int) -> Table:
    """tokens and segment_ids [R, length], padded on the right; labels [R, ...]; weights [R] of 1.

    Labels are classes [R], integers, or numbers [R, C]. ValueError for an example that is empty or
    too long, or when labels are not as many.
    """
    labels = np.asarray(labels)
    _require_as_many(sequences, labels)
    table = _padded(sequences, length)
    kind = np.int32 if np.issubdtype(labels.dtype, np.integer) else np.float32
    return table | {"labels": labels.astype(kind), "weights": np.ones(len(labels), np.float32)}


def candidate_rows(
    candidates: Sequence[Sequence[Sequence[int]]],
    starts: Sequence[Sequence[int]],
    labels: Sequence[int],
    length: int,
) -> Table:
    """C candidates an example: tokens, targets, segment_ids, counted [R, C, length], labels, weights [R].

    candidates[r][c] is prompt and continuation together; `counted` is 1 where the target is token
    starts[r][c] or a later one. A row holds all tokens but the last, so length + 1 is the most.
    ValueError when examples differ in the number of candidates, or a start is not inside.
    """
    _require_as_many(candidates, np.asarray(labels))
    if len(numbers := {len(own) for own in candidates}) != 1:
        raise ValueError(f"examples have {sorted(numbers)} candidates; expected one number")
    C = numbers.pop()
    flat = [list(ids) for own in candidates for ids in own]
    begins = [start for own in starts for start in own]
    table = _padded([ids[:-1] for ids in flat], length)
    targets, counted = np.zeros((len(flat), length), np.int32), np.zeros((len(flat), length))
    for row, (ids, start) in enumerate(zip(flat, begins, strict=True)):
        if not 1 <= start < len(ids):
            raise ValueError(f"candidate {row}: start {start} is not in 1..{len(ids) - 1}")
        targets[row, : len(ids) - 1] = ids[1:]
        counted[row, start - 1 : len(ids) - 1] = 1
    table |= {"targets": targets, "counted": counted.astype(np.float32)}
    shaped = {name: values.reshape(-1, C, length) for name, values in table.items()}
    ones = np.ones(len(labels), np.float32)
    return shaped | {"labels": np.asarray(labels, np.int32), "weights": ones}


def _padded(sequences: Sequence[Sequence[int]], length: int) -> Table:
    table = {
        name: np.zeros((len(sequences), length), np.int32) for name in ("tokens", "segment_ids")
    }
    for row, ids in enumerate(sequences):
        if not 1 <= len(ids) <= length:
            raise ValueError(f"example {row} has {len(ids)} tokens, expected 1..{length}")
        table["tokens"][row, : len(ids)] = ids
        table["segment_ids"][row, : len(ids)] = 1
    return table


def _require_as_many(examples: Sequence[Any], labels: np.ndarray) -> None:
    if not len(examples) or labels.ndim == 0 or len(examples) != len(labels):
        raise ValueError(
            f"{len(examples)} examples with labels {labels.shape}; expected one label an example"
        )
