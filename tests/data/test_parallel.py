"""Pairs in rows: by hand, and every pair exactly once."""

import numpy as np
import pytest

from research.data import parallel, source
from research.data.parallel import Pair

BOS, EOS = 1, 2


def test_two_pairs_in_a_row_by_hand():
    table = parallel.pack_pairs([Pair([7, 8], [9]), Pair([5], [6, 7])], 7, BOS, EOS)
    expected = {
        "source": [7, 8, EOS, 5, EOS, 0, 0],
        "source_segment_ids": [1, 1, 1, 2, 2, 0, 0],
        "source_positions": [0, 1, 2, 0, 1, 0, 0],
        "tokens": [BOS, 9, BOS, 6, 7, 0, 0],
        "targets": [9, EOS, 6, 7, EOS, 0, 0],
        "weights": [1, 1, 1, 1, 1, 0, 0],
        "segment_ids": [1, 1, 2, 2, 2, 0, 0],
        "positions": [0, 1, 0, 1, 2, 0, 0],
    }
    assert {name: values.tolist() for name, values in table.items()} == {
        name: [values] for name, values in expected.items()
    }


def test_every_pair_is_there_once_with_its_own_source():
    rng = np.random.default_rng(0)
    pairs = [
        Pair(rng.integers(3, 99, rng.integers(1, 12)), rng.integers(3, 99, rng.integers(1, 12)))
        for _ in range(50)
    ]
    table = parallel.pack_pairs(pairs, 16, BOS, EOS)
    found = []
    for row in range(len(table["tokens"])):
        for segment in range(1, table["segment_ids"][row].max() + 1):
            side = table["source"][row][table["source_segment_ids"][row] == segment]
            target = table["targets"][row][table["segment_ids"][row] == segment]
            assert side[-1] == target[-1] == EOS
            found.append((tuple(side[:-1]), tuple(target[:-1])))
    assert sorted(found) == sorted((tuple(p.source), tuple(p.target)) for p in pairs)
    assert len(table["tokens"]) < len(pairs) / 1.3


def test_rows_are_a_source_of_batches():
    pairs = [Pair([3] * n, [4] * n) for n in range(1, 9)]
    rows = parallel.pack_pairs(pairs, 12, BOS, EOS)
    batch = source.supervised_batch(rows, 2, seed=0, step=0)
    assert batch.keys() == rows.keys() and batch["source"].shape == (2, 12)
    assert batch["weights"].sum() == pytest.approx(1)


def test_errors_name_the_pair():
    with pytest.raises(ValueError, match=r"pair 1 has 5 tokens, an end included, more than .* 4"):
        parallel.pack_pairs([Pair([3], [3]), Pair([3], [3] * 4)], 4, BOS, EOS)
    with pytest.raises(ValueError, match="no pairs to pack"):
        parallel.pack_pairs([], 4, BOS, EOS)
