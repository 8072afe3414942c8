"""Best-of-n sampling: the answer that a reward prefers among n, and how far from the policy that is.

From N ≥ n answers of a prompt the expectation over all choices of n is exact, so that one set of samples
serves every n (Nakano et al. 2021, arXiv:2112.09332, appendix; Gao et al. 2023, arXiv:2210.10760).
"""

from __future__ import annotations

from math import comb, log

import numpy as np


def kl(n: int) -> float:
    """log n − (n − 1)/n in nats: KL of best-of-n from the policy (Stiennon et al. 2020, arXiv:2009.01325), exact
    where no two answers score alike, and an upper bound otherwise."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return log(n) - (n - 1) / n


def expected(proxy: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    """Mean `value` of the answer with the highest `proxy` among n of N drawn without replacement, [...] of
    [..., N].

    The answer with i − 1 below it is the best of C(i − 1, n − 1) of all C(N, n) choices. Answers of equal
    proxy are equally likely to be taken.
    """
    proxy, value = np.asarray(proxy, float), np.asarray(value, float)
    if proxy.shape != value.shape or proxy.ndim < 1:
        raise ValueError(f"proxy {proxy.shape} and value {value.shape} must be equal and [..., N]")
    count = proxy.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"n must be in 1..{count}, the answers of a prompt; got {n}")
    chance = np.array([comb(i, n - 1) / comb(count, n) for i in range(count)])
    flat = zip(proxy.reshape(-1, count), value.reshape(-1, count), strict=True)
    return np.array([_ascending(p, v) @ chance for p, v in flat]).reshape(proxy.shape[:-1])


def _ascending(proxy: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Values in the order of the proxy, those of equal proxy by their mean."""
    _, group, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    means = np.bincount(group, value) / counts
    return np.repeat(means, counts)
