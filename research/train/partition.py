"""Which leaves train: split a parameter tree in two by path, and put it back.

Only the trainable half is differentiated, so gradients and optimizer state exist for nothing else.
A hole is `None`, which JAX treats as an empty subtree; holes may lie inside a Weight node
(`.../kernel/a` trains, `.../kernel/base` does not). After equinox's `partition` and `combine`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.paths import assign, map_named, named_leaves, require_match
from research.types import Params

# A regular expression for the paths that train (the others are frozen), or (regex, trains) pairs
# of which the first match counts and which must cover every path.
Rule = str | Sequence[tuple[str, bool]]


def partition(params: Params, rule: Rule) -> tuple[Params, Params]:
    """(trainable, frozen): two trees of the structure of `params`, each `None` where the other is not.

    Raises RuleError when an expression matches no path or a pair rule leaves a path uncovered, and
    TypeError when a leaf that is not floating point (quantized codes) would be trained.
    """
    trains = _decide(rule, [name for name, _ in named_leaves(params)])
    for name, leaf in named_leaves(params):
        if trains[name] and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(f"{name} is {jnp.result_type(leaf)} and cannot be trained; freeze it")
    trainable = map_named(lambda name, leaf: leaf if trains[name] else None, params)
    frozen = map_named(lambda name, leaf: None if trains[name] else leaf, params)
    return trainable, frozen


def combine(trainable: Params, frozen: Params) -> Params:
    """The inverse of `partition`. ValueError where both trees hold a leaf."""
    return jax.tree.map(_whichever, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def _decide(rule: Rule, names: Sequence[str]) -> dict[str, bool]:
    if isinstance(rule, str):
        require_match(rule, names)
        return {name: re.fullmatch(rule, name) is not None for name in names}
    return {name: bool(value) for name, value in assign(rule, names).items()}


def _whichever(trainable: Any, frozen: Any) -> Any:
    if trainable is not None and frozen is not None:
        raise ValueError("combine: a leaf is in both trees; they do not come from one partition")
    return frozen if trainable is None else trainable
