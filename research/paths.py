"""Leaves of a parameter tree by name: 'stack_0/block_0/attention/q/kernel', and rules over names.

A rule is a regular expression that must match the whole path (`re.fullmatch`). A rule that matches
nothing is an error: it is nearly always a misspelt layer name, and training the wrong leaves is
silent otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from research.types import PyTree


class RuleError(ValueError):
    """A path rule matches nothing, or a path is covered by no rule."""


def path_string(path: Sequence[Any]) -> str:
    """A JAX key path as 'a/b/c'; a Weight's own leaves come last ('.../kernel/a')."""
    return "/".join(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def named_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """[(path, leaf)] in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_string(path), leaf) for path, leaf in leaves]


def map_named(function: Callable[..., Any], tree: PyTree, *rest: PyTree, is_leaf=None) -> PyTree:
    """`function(path, leaf, *others)` over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_string(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def require_match(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that `pattern` matches whole; RuleError when there is none."""
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        shown = ", ".join(list(names)[:8])
        raise RuleError(
            f"path rule {pattern!r} matches none of {len(names)} paths; they are like: {shown}"
        )
    return found


def assign(rules: Sequence[tuple[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """{name: value of the first rule that matches}; every rule must match, every name be covered."""
    for pattern, _ in rules:
        require_match(pattern, names)
    values: dict[str, Any] = {}
    for name in names:
        for pattern, value in rules:
            if re.fullmatch(pattern, name):
                values[name] = value
                break
        else:
            raise RuleError(f"no rule covers {name!r}; rules: {[pattern for pattern, _ in rules]}")
    return values
