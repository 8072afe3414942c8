"""Rows of labelled examples, written out."""

import numpy as np
import pytest

from research.data.labelled import candidate_rows, rows


def test_rows():
    table = rows([[5, 6, 7], [8]], [1, 0], 4)
    assert table["tokens"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert table["segment_ids"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert table["labels"].dtype == np.int32
    assert table["weights"].tolist() == [1, 1]
    numbers = rows([[5]], [[0.5, 2]], 1)["labels"]
    assert numbers.dtype == np.float32
    assert numbers.shape == (1, 2)


def test_candidates():
    table = candidate_rows([[[5, 6, 7], [5, 8]]], [[1, 1]], [1], 3)
    assert table["tokens"].tolist() == [[[5, 6, 0], [5, 0, 0]]]
    assert table["targets"].tolist() == [[[6, 7, 0], [8, 0, 0]]]
    assert table["counted"].tolist() == [[[1, 1, 0], [1, 0, 0]]]
    assert candidate_rows([[[5, 6, 7]]], [[2]], [0], 2)["counted"].tolist() == [[[0, 1]]]


def test_refusals():
    with pytest.raises(ValueError, match=r"example 1 has 3 tokens, expected 1\.\.2"):
        rows([[1], [1, 2, 3]], [0, 0], 2)
    with pytest.raises(ValueError, match=r"2 examples with labels \(1,\)"):
        rows([[1], [1]], [0], 2)
    with pytest.raises(ValueError, match=r"\[1, 2\] candidates"):
        candidate_rows([[[1, 2]], [[1, 2], [1, 3]]], [[1], [1, 1]], [0, 0], 2)
    with pytest.raises(ValueError, match=r"start 2 is not in 1\.\.1"):
        candidate_rows([[[1, 2]]], [[2]], [0], 2)
