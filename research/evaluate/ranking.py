"""How well scores order things: agreement of pairs, ranks, and relevance; and how sure a win rate is.

Scores and labels are numpy arrays; nothing here is traced. Greater scores are better.
"""

from __future__ import annotations

import numpy as np

from research.evaluate.choice import Z_95, wilson


def pairwise_accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """Share of pairs whose chosen score is the greater; a tie counts half."""
    chosen, rejected = _same(chosen, rejected)
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def win_rate(wins: int, losses: int, ties: int = 0, z: float = Z_95) -> tuple[float, float, float]:
    """(rate, lower, upper): wins and half of the ties over all, with Wilson's interval."""
    total = wins + losses + ties
    if min(wins, losses, ties) < 0 or total == 0:
        raise ValueError(f"{wins} wins, {losses} losses and {ties} ties: nothing was judged")
    won = wins + ties / 2
    return won / total, *wilson(won, total, z)


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """τ-b: concordant less discordant pairs, over the pairs that neither ties (Kendall 1945). nan where one
    of the two is constant."""
    a, b = _same(a, b)
    signs = [np.sign(x[:, None] - x)[np.triu_indices(len(x), 1)] for x in (a, b)]
    untied = [np.count_nonzero(sign) for sign in signs]
    return (
        float(np.sum(signs[0] * signs[1]) / np.sqrt(np.prod(np.array(untied, float))))
        if all(untied)
        else float("nan")
    )


def ranks(x: np.ndarray) -> np.ndarray:
    """1 for the smallest; ties share the mean of their ranks."""
    x = np.asarray(x)
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks. nan where one of the two is constant."""
    a, b = (ranks(x) - ranks(x).mean() for x in _same(a, b))
    scale = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / scale) if scale else float("nan")


def ndcg(scores: np.ndarray, relevance: np.ndarray, k: int | None = None) -> float:
    """Normalised discounted cumulative gain of the first k by score: Σ (2^rel − 1) / log2(place + 1), over
    that of the best order (Järvelin and Kekäläinen 2002). 0 where nothing is relevant; ties in the scores
    keep their order."""
    scores, relevance = _same(scores, relevance)
    k = len(scores) if k is None else k
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    gains = 2.0 ** np.asarray(relevance, float) - 1
    discounts = 1 / np.log2(np.arange(2, len(gains) + 2))
    found = gains[np.argsort(-scores, kind="stable")]
    best = (np.sort(gains)[::-1][:k] * discounts[:k]).sum()
    return float((found[:k] * discounts[:k]).sum() / best) if best else 0.0


def reciprocal_rank(scores: np.ndarray, relevant: np.ndarray) -> float:
    """1 / the place of the first relevant thing by score; 0 where there is none. Its mean over queries is
    MRR."""
    scores, relevant = _same(scores, relevant)
    places = np.flatnonzero(np.asarray(relevant, bool)[np.argsort(-scores, kind="stable")])
    return 1 / (places[0] + 1) if len(places) else 0.0


def expected_calibration_error(
    probabilities: np.ndarray, happened: np.ndarray, bins: int = 10
) -> float:
    """Σ over bins of equal width: share of predictions there times |mean prediction − share that
    happened| (Guo et al. 2017, arXiv:1706.04599). Probabilities are of the event itself."""
    probabilities, happened = _same(probabilities, happened)
    if bins < 1 or np.min(probabilities) < 0 or np.max(probabilities) > 1:
        raise ValueError(f"probabilities must lie in [0, 1] and bins be at least 1, not {bins}")
    at = np.minimum((probabilities * bins).astype(int), bins - 1)
    counts = np.bincount(at, minlength=bins)
    gaps = np.abs(
        np.bincount(at, probabilities, bins) - np.bincount(at, np.asarray(happened, float), bins)
    )
    return float(gaps.sum() / counts.sum())


def _same(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"expected two equal arrays of one axis, not {a.shape} and {b.shape}")
    return a, b
