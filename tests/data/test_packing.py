"""Packed rows hold the same examples, no label crosses between them, and few places are empty."""

import numpy as np
import pytest

from research.data import packing, supervised


def made(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        supervised.shift(rng.integers(1, 100, n), rng.integers(0, 2, n).astype(np.float32))
        for n in lengths
    ]


@pytest.fixture(scope="module")
def examples():
    return made(np.random.default_rng(1).integers(2, 65, 300))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("window", [4096, 50])
def test_packed_rows_reproduce_every_example(examples, window):
    found = packing.unpack(packing.pack(examples, 64, window))
    key = lambda e: (e.tokens.tolist(), e.targets.tolist(), e.weights.tolist())  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, examples))


def test_padded_rows_reproduce_every_example_in_order(examples):
    table = packing.pad(examples, 64, pad_id=7)
    assert table["tokens"].shape == (300, 64)
    assert all(same(a, b) for a, b in zip(packing.unpack(table), examples, strict=True))
    empty = table["segment_ids"] == 0
    assert (table["tokens"][empty] == 7).all() and (table["weights"][empty] == 0).all()


def test_fields_of_a_packed_row_by_hand():
    a = supervised.shift([5, 6, 7], [0, 1, 1])
    b = supervised.shift([8, 9], [1, 1])
    table = packing.pack([a, b], 6)
    row = {name: values[0].tolist() for name, values in table.items()}
    assert row == {
        "tokens": [5, 6, 7, 8, 9, 0],
        "targets": [6, 7, 7, 9, 9, 0],
        "weights": [1, 1, 0, 1, 0, 0],
        "segment_ids": [1, 1, 1, 2, 2, 0],
        "positions": [0, 1, 2, 0, 1, 0],
    }
    assert packing.fill_ratio(table) == pytest.approx(5 / 6)


def test_no_label_crosses_a_boundary(examples):
    table = packing.pack(examples, 64)
    segments = np.pad(table["segment_ids"], ((0, 0), (0, 1)))
    last = (segments[:, :-1] != segments[:, 1:]) & (segments[:, :-1] != 0)
    assert last.sum() == len(examples)
    assert (table["weights"][last] == 0).all()


def test_rows_are_well_filled(examples):
    table = packing.pack(examples, 64)
    least = -(-sum(len(e.tokens) for e in examples) // 64)
    assert len(table["tokens"]) <= 1.06 * least
    assert packing.fill_ratio(table) > 0.94
    assert packing.fill_ratio(table) > 1.5 * packing.fill_ratio(packing.pad(examples, 64))


def test_best_fit_by_hand():
    # 6 | 5 | 4 goes to the 6 (fuller of the two that have room), 3 to the 5, 2 beside it
    assert packing.best_fit([3, 5, 6, 4, 2], 10) == [[2, 3], [0, 1, 4]]


def test_stream_windows_cover_the_stream_once():
    stream = np.arange(100, 133)
    count = packing.windows(len(stream), 8)
    rows = [packing.stream_row(stream, i, 8) for i in range(count)]
    assert count == 4
    assert np.concatenate([r["tokens"] for r in rows]).tolist() == list(range(100, 132))
    assert np.concatenate([r["targets"] for r in rows]).tolist() == list(range(101, 133))
    assert all((r["weights"] == 1).all() and (r["segment_ids"] == 1).all() for r in rows)
    with pytest.raises(IndexError, match="window 4 of 4"):
        packing.stream_row(stream, 4, 8)


def test_documents_of_a_stream_are_segments():
    row = packing.stream_row(np.array([4, 0, 5, 6, 0, 0, 7, 8, 9]), 0, 8, end_id=0)
    assert row["segment_ids"].tolist() == [1, 1, 2, 2, 2, 3, 4, 4]
    assert row["positions"].tolist() == [0, 1, 0, 1, 2, 0, 0, 1]
    assert row["weights"].tolist() == [1, 0, 1, 1, 0, 0, 1, 1]
    assert row["targets"].tolist() == [0, 5, 6, 0, 0, 7, 8, 9]


def test_too_long_or_nothing_is_an_error():
    with pytest.raises(ValueError, match="example 1 has 9 tokens, more than the row's 8"):
        packing.pack(made([3, 9]), 8)
    with pytest.raises(ValueError, match="empty data set"):
        packing.pad([], 8)


def test_batches_hold_every_row_once_and_are_of_one_shape():
    table = {"tokens": np.arange(10).reshape(5, 2), "weights": np.ones((5, 2), np.float32)}
    parts = list(packing.batches(table, 2))
    assert [part["tokens"].shape for part in parts] == [(2, 2)] * 3
    np.testing.assert_array_equal(np.concatenate([p["tokens"] for p in parts])[:5], table["tokens"])
    np.testing.assert_array_equal(parts[-1]["weights"], [[1, 1], [0, 0]])
