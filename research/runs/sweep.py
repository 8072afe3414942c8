"""A sweep is a list of override dicts, one a run, put together from smaller sweeps.

    product(param("weights.rank", 1, 2, 4, 8), param("seed", 0, 1))        8 runs
    chain(product(...), [{"optim.lr": 1e-3}])                              one more

After the sweeps of Google DeepMind's simply (utils/sweep.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

Sweep = list[dict[str, Any]]


def param(name: str, *values: Any) -> Sweep:
    """One run for each value of the field `name`."""
    if not values:
        raise ValueError(f"param({name!r}) needs at least one value")
    return [{name: value} for value in values]


def product(*sweeps: Sequence[dict[str, Any]]) -> Sweep:
    """Every combination, the last sweep varying fastest."""
    return [_union(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[dict[str, Any]]) -> Sweep:
    """The first of each, then the second of each; all must be equally long."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ValueError(f"zipped sweeps must be equally long, not {lengths}")
    return [_union(parts) for parts in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[dict[str, Any]]) -> Sweep:
    """All the runs of the first, then all those of the second."""
    return [dict(run) for sweep in sweeps for run in sweep]


def _union(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    union: dict[str, Any] = {}
    for part in parts:
        twice = union.keys() & part.keys()
        if twice:
            raise ValueError(f"two of the combined sweeps set {sorted(twice)}")
        union.update(part)
    return union
