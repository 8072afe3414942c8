"""Strengths from comparisons: Bradley–Terry, Thurstone, Plackett–Luce and Elo; and whether any exist.

`wins` [n, n] counts how often row beat column, its diagonal 0. Strengths are on the scale of log-odds
(Thurstone: of standard deviations), with mean 0, since only differences mean anything. A reward model is
Bradley–Terry whose strengths a network gives (`losses.preference`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.types import Array


def bradley_terry(a: Array, b: Array) -> Array:
    """log P(a beats b) = log σ(a − b) of strengths (Bradley and Terry 1952)."""
    return jax.nn.log_sigmoid(a - b)


def thurstone(a: Array, b: Array) -> Array:
    """log P(a beats b) = log Φ((a − b) / √2): two draws of unit variance (Thurstone 1927, case V)."""
    return jax.scipy.stats.norm.logcdf((a - b) / np.sqrt(2))


def plackett_luce(strengths: Array) -> Array:
    """log P of the order in which strengths [..., K] are given, best first (Luce 1959, Plackett 1975):
    Σ_k s_k − log Σ_{j ≥ k} exp s_j. For K = 2 it is Bradley–Terry."""
    rest = jnp.flip(jax.lax.cumlogsumexp(jnp.flip(strengths, -1), axis=strengths.ndim - 1), -1)
    return (strengths - rest).sum(-1)


def fit(
    wins: np.ndarray, model: Callable[[Array, Array], Array] = bradley_terry, steps: int = 100
) -> np.ndarray:
    """The likeliest strengths [n], by Newton's method.

    ValueError where they do not exist: unless the comparisons tie all players together, so that each is
    beaten, in some chain, by each (Ford 1957).
    """
    wins = _counts(wins)
    if not _strongly_connected(wins > 0):
        raise ValueError(
            "strengths have no likeliest value: some players never lost to some others, not even in a chain"
        )

    def loss(s: Array) -> Array:
        return -(wins * model(s[:, None], s[None, :])).sum() + 0.5 * jnp.square(s.sum())

    strengths = jnp.zeros(len(wins))
    for _ in range(steps):
        step = jnp.linalg.solve(jax.hessian(loss)(strengths), jax.grad(loss)(strengths))
        strengths = strengths - step / jnp.maximum(1.0, jnp.abs(step).max())
        if jnp.abs(step).max() < 1e-6:
            break
    return np.asarray(strengths - strengths.mean())


def elo(
    matches: Sequence[tuple[int, int, float]],
    players: int,
    k: float = 32.0,
    start: float = 1500.0,
) -> np.ndarray:
    """Ratings [players] after matches (a, b, score of a: 1, ½ or 0), in order (Elo 1978).

    The expected score is 1 / (1 + 10^((R_b − R_a)/400)); the winner takes k times the surprise.
    """
    ratings = np.full(players, start)
    for a, b, score in matches:
        surprise = k * (score - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        ratings[a] += surprise
        ratings[b] -= surprise
    return ratings


def elo_interval(
    matches: Sequence[tuple[int, int, float]], players: int, draws: int = 200, seed: int = 0
) -> np.ndarray:
    """[players, 3]: median, 2.5 % and 97.5 % of ratings over matches drawn again with replacement, which
    also takes the order out of them."""
    random, matches = np.random.default_rng(seed), list(matches)
    if not matches:
        raise ValueError("ratings need at least one match")
    found = [
        elo([matches[i] for i in random.integers(0, len(matches), len(matches))], players)
        for _ in range(draws)
    ]
    return np.quantile(found, [0.5, 0.025, 0.975], axis=0).T


def cyclic_triads(wins: np.ndarray) -> float:
    """How many of three players beat each other in a circle, by majority; a tie counts half both ways."""
    wins = _counts(wins)
    beats = (wins > wins.T) + 0.5 * (wins == wins.T)
    np.fill_diagonal(beats, 0)
    return float(np.trace(beats @ beats @ beats) / 3)


def intransitivity(wins: np.ndarray, draws: int = 500, seed: int = 0) -> tuple[float, float]:
    """(circles, p): how likely as many circles are if Bradley–Terry is true, by simulating the same numbers
    of comparisons from its fit. A small p speaks against one strength a player."""
    wins = _counts(wins)
    strengths, total = fit(wins), wins + wins.T
    chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    random, found = np.random.default_rng(seed), cyclic_triads(wins)
    above = np.triu_indices(len(wins), 1)
    as_many = 0
    for _ in range(draws):
        drawn = np.zeros_like(wins)
        drawn[above] = random.binomial(total[above].astype(int), chance[above])
        drawn.T[above] = total[above] - drawn[above]
        as_many += cyclic_triads(drawn) >= found
    return found, (as_many + 1) / (draws + 1)


def _counts(wins: np.ndarray) -> np.ndarray:
    wins = np.asarray(wins, float)
    square = wins.ndim == 2 and wins.shape[0] == wins.shape[1]
    if not square or (wins < 0).any() or np.diagonal(wins).any():
        raise ValueError(
            f"wins must be [n, n], not negative, with a diagonal of 0; got {wins.shape}"
        )
    return wins


def _strongly_connected(beats: np.ndarray) -> bool:
    reach = beats | np.eye(len(beats), dtype=bool)
    for _ in range(len(beats).bit_length()):  # chains of twice the length
        reach = (reach.astype(float) @ reach) > 0
    return bool(reach.all())
