"""Averages of weights: along one run, and of several runs.

    SWA            stochastic weight averaging, Izmailov et al. 2018 (arXiv:1803.05407): the plain
                   mean of the parameters every so many steps, from one step on
    uniform_soup   model soups, Wortsman et al. 2022 (arXiv:2203.05482): the mean of fine-tuned models
    greedy_soup    algorithm 1 there: best first, each kept only if the mean does not get worse

Differs from the papers: SWA's rate is whatever the optimizer's schedule is (constant is usual; the
paper's cycles are not built), and no statistics of batch norm are taken anew, as no model here has
them. A soup is made in float32 and has the dtypes of its first tree. The limits: SWA of one step, and
a soup of one model, are that model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from research.paths import map_named, named_leaves
from research.types import Array, Params


@dataclass(frozen=True)
class SWA:
    """The mean of the parameters after steps start, start + every, start + 2 every, ...

    Steps count from 1; before `start` the average is the parameters as they are.
    """

    start: int
    every: int = 1

    def __post_init__(self):
        for name in ("start", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"SWA.{name} must be at least 1, not {getattr(self, name)}")

    def share(self, step: Array) -> Array:
        """What part of the average after step `step` (from 1) is the newest parameters, [] float32."""
        since = step - self.start
        due = 1.0 / (since // self.every + 1).astype(jnp.float32)
        return jnp.where(since < 0, 1.0, jnp.where(since % self.every == 0, due, 0.0))


def uniform_soup(trees: Sequence[Params]) -> Params:
    """The mean of every leaf. ValueError naming the first path in which the trees differ."""
    require_alike(trees)

    def mean(first: Any, *rest: Any) -> Array:
        total = sum((leaf.astype(jnp.float32) for leaf in rest), first.astype(jnp.float32))
        return (total / len(trees)).astype(first.dtype)

    return jax.tree.map(mean, *trees)


def greedy_soup(
    trees: Sequence[Params], evaluate: Callable[[Params], float]
) -> tuple[Params, tuple[int, ...]]:
    """(soup, which trees are in it, best first); `evaluate` gives what is to be high.

    Each tree is added in order of its own value, and stays when the soup with it is at least as
    good as without. Evaluate on held-out data that the final test does not use.
    """
    require_alike(trees)
    alone = [float(evaluate(tree)) for tree in trees]
    order = sorted(range(len(trees)), key=lambda i: (-alone[i], i))
    chosen, best = [order[0]], alone[order[0]]
    for candidate in order[1:]:
        value = float(evaluate(uniform_soup([trees[i] for i in [*chosen, candidate]])))
        if value >= best:
            chosen, best = [*chosen, candidate], value
    return uniform_soup([trees[i] for i in chosen]), tuple(chosen)


def require_alike(trees: Sequence[Params]) -> None:
    """ValueError unless there is a tree and all have the same paths and shapes, and float leaves."""
    if not trees:
        raise ValueError("a soup needs at least one tree of parameters")
    first = {name: leaf.shape for name, leaf in named_leaves(trees[0])}
    map_named(_require_float, trees[0])
    for number, tree in enumerate(trees[1:], start=1):
        other = {name: leaf.shape for name, leaf in named_leaves(tree)}
        for name in sorted(first | other):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"trees 0 and {number} are not of one model: {name} is "
                    f"{first.get(name, 'absent')} and {other.get(name, 'absent')}"
                )


def _require_float(name: str, leaf: Any) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ValueError(f"{name} is {leaf.dtype} and has no mean")
