"""How much a text repeats itself: distinct n-grams and repetition, over token ids.

distinct-n, Li et al. 2016 (arXiv:1510.03055): different n-grams over all n-grams, of all texts
together. rep-n, Welleck et al. 2019 (arXiv:1908.04319): 1 - different / all, within each text, then
the mean over texts.
"""

from __future__ import annotations

from collections.abc import Sequence


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens, in order; none in a shorter text."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts over their number; ValueError when there are none."""
    grams = [gram for ids in texts for gram in ngrams(ids, n)]
    if not grams:
        raise ValueError(f"no text has {n} tokens")
    return len(set(grams)) / len(grams)


def repetition(texts: Sequence[Sequence[int]], n: int) -> float:
    """1 - different / all n-grams of a text, the mean over texts that have any; ValueError when
    none has."""
    rates = [1 - len(set(g)) / len(g) for ids in texts if (g := ngrams(ids, n))]
    if not rates:
        raise ValueError(f"no text has {n} tokens")
    return sum(rates) / len(rates)
