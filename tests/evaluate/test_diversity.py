"""Distinct n-grams and repetition by hand."""

import pytest

from research.evaluate.diversity import distinct, ngrams, repetition

TEXTS = [[1, 2, 1, 2, 1], [3, 1, 2], [4]]


def test_by_hand():
    """Pairs: 12 21 12 21 | 31 12: three different of six; within the texts 2 of 4, and 2 of 2."""
    assert ngrams([5, 6, 7], 2) == [(5, 6), (6, 7)]
    assert distinct(TEXTS, 2) == pytest.approx(3 / 6)
    assert distinct(TEXTS, 1) == pytest.approx(4 / 9)
    assert repetition(TEXTS, 2) == pytest.approx((1 / 2 + 0) / 2)
    assert repetition([[7] * 10], 4) == pytest.approx(1 - 1 / 7)


def test_texts_that_are_too_short():
    for measure in (distinct, repetition):
        with pytest.raises(ValueError, match="no text has 6 tokens"):
            measure(TEXTS, 6)
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            measure(TEXTS, 0)
