"""Fine-tuning by depth: which layers train, how fast, and from which step on.

Depth 0 is what tokens become (`embed`, `position`); depths 1..L are the layers, stack after stack;
depth L + 1 is all that stands after them (`final_norm`, `head`, heads that were added). Every
function gives the `rates` of an Optimizer for a tree of stacked parameters: as `decoder.init` makes
it, its trainable part (with a leaf of every block), or their shapes.

    frozen_below           nothing under a depth trains
    layerwise_decay        ULMFiT's discriminative rates, Howard & Ruder 2018 (arXiv:1801.06146),
                           section 3.2: eta_(l-1) = eta_l / 2.6; 0.8 to 0.95 are usual for
                           transformers (ELECTRA, arXiv:2003.10555, 0.8)
    gradual_unfreezing     section 3.3 there: the last depth first, one more every so many steps

The limits: a decay of 1, `frozen_below` depth 0, and unfreezing every 0 steps are plain training.

Differs from the paper:
1. A layer is a block of the trunk; the paper's are the embedding, three LSTMs and two dense ones.
2. What is still frozen has moments in the optimizer all the same, so that it begins warm, and its
   gradient counts in the global norm that is clipped. torch's parameters without gradient have
   neither.
3. A stacked leaf is one array, so a layer of it that is frozen is saved neither gradient nor state:
   its rate is 0, and it stays as it is bitwise. What is frozen for good outside the stacks has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from research.paths import named_leaves
from research.types import Array, Params

ULMFIT = 1 / 2.6  # the paper's decay from a layer to the one below
_FIRST = r"(embed|position)/.*"
_BLOCK = re.compile(r"stack_(\d+)/block_(\d+)/.*")

Rates = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Unfreezing:
    """A rate's multiplier that is 0 before `start` and `rate` from that step on (counted from 0).

    Both are numbers, or as long as the stack whose layers they are for. The step that it goes by is
    the optimizer's own, so that a resumed run goes on where it stopped.
    """

    start: int | tuple[int, ...]
    rate: float | tuple[float, ...] = 1.0

    def __call__(self, step: Array) -> Array:
        rates = jnp.asarray(self.rate, jnp.float32)
        return jnp.where(step >= jnp.asarray(self.start, jnp.int32), rates, 0.0)


def depths(params: Params) -> tuple[tuple[str, int | tuple[int, ...]], ...]:
    """(expression, depth, or the depths of its layers) for all of `params`, in order of depth.

    Expressions that would match nothing are left out. ValueError for leaves of a stack that have no
    leading axis of layers, or stand in a tree within a tree (an encoder's).
    """
    names = [name for name, _ in named_leaves(params)]
    found: list[tuple[str, Any]] = []
    if any(re.fullmatch(_FIRST, name) for name in names):
        found.append((_FIRST, 0))
    below = 0
    for stack, blocks in sorted(_stacks(params).items()):
        cycle, layers = _size(blocks)
        for place, own in sorted(blocks.items()):
            at = tuple(below + place + 1 + cycle * n for n in range(own))
            found.append((f"stack_{stack}/block_{place}/.*", at))
        below += cycle * layers
    if any(not re.fullmatch(_FIRST, name) and not _BLOCK.fullmatch(name) for name in names):
        found.append((r".*", below + 1))
    return tuple(found)


def count(params: Params) -> int:
    """How many depths there are: the layers and two."""
    return sum(cycle * layers for cycle, layers in map(_size, _stacks(params).values())) + 2


def by_depth(params: Params, multipliers: Sequence[float | None]) -> Rates:
    """Rates from one multiplier a depth, lowest first; None freezes.

    ValueError when there are not as many as depths.
    """
    _require_count(params, multipliers)

    def of(depth: int | tuple[int, ...]) -> float | tuple[float, ...] | None:
        if isinstance(depth, int):
            return multipliers[depth]
        chosen = [multipliers[each] for each in depth]
        return None if set(chosen) == {None} else tuple(each or 0.0 for each in chosen)

    return _rates(params, of)


def frozen_below(params: Params, depth: int) -> Rates:
    """1 from `depth` on, None and 0 below it. ValueError when no depth would be left."""
    total = count(params)
    if not 0 <= depth < total:
        raise ValueError(f"frozen_below: depth must be in 0..{total - 1}, got {depth}")
    return by_depth(params, [None if each < depth else 1.0 for each in range(total)])


def layerwise_decay(params: Params, decay: float) -> Rates:
    """decay^(L + 1 - depth): 1 at the last depth, decay times as much at each one below."""
    return by_depth(params, decayed(count(params), decay))


def decayed(total: int, decay: float) -> tuple[float, ...]:
    """The multipliers of `layerwise_decay` for so many depths, lowest first."""
    if not decay > 0:
        raise ValueError(f"a layer-wise decay must be more than 0, got {decay}")
    return tuple(decay ** (total - 1 - depth) for depth in range(total))


def gradual_unfreezing(
    params: Params, every: int, multipliers: Sequence[float] | None = None
) -> Rates:
    """The last depth trains from the first step on, the one below it from step `every`, ...

    `multipliers`, one a depth, are the rates once a depth trains (`decayed(...)`, say), 1 at first.
    ULMFiT unfreezes once an epoch.
    """
    total = count(params)
    if every < 0:
        raise ValueError(f"gradual_unfreezing: every must be at least 0 steps, got {every}")
    rates = [1.0] * total if multipliers is None else list(multipliers)
    _require_count(params, rates)

    def of(depth: int | tuple[int, ...]) -> Unfreezing:
        if isinstance(depth, int):
            return Unfreezing(every * (total - 1 - depth), rates[depth])
        starts = tuple(every * (total - 1 - each) for each in depth)
        return Unfreezing(starts, tuple(rates[each] for each in depth))

    return _rates(params, of)


def _rates(params: Params, of: Callable[[Any], Any]) -> Rates:
    return tuple((expression, of(depth)) for expression, depth in depths(params))


def _stacks(params: Params) -> dict[int, dict[int, int]]:
    """{stack: {block of its cycle: layers}}."""
    found: dict[int, dict[int, int]] = {}
    for name, leaf in named_leaves(params):
        match = _BLOCK.fullmatch(name)
        if match is None and re.search(r"(^|/)stack_\d+/", name):
            raise ValueError(
                f"{name}: rates by depth want stack_N/block_M/... at the top of the tree, layers "
                "stacked on the leading axis"
            )
        if match is None:
            continue
        layers = leaf.shape[0] if leaf.shape else 0
        held = found.setdefault(int(match[1]), {}).setdefault(int(match[2]), layers)
        if held != layers or not layers:
            raise ValueError(f"{name} {tuple(leaf.shape)} has no leading axis of {held} layers")
    return found


def _size(blocks: dict[int, int]) -> tuple[int, int]:
    """(blocks of a stack's cycle, how often it is repeated)."""
    return max(blocks) + 1, max(blocks.values())


def _require_count(params: Params, multipliers: Sequence[Any]) -> None:
    total = count(params)
    if len(multipliers) != total:
        raise ValueError(
            f"expected {total} multipliers, one a depth (embeddings, {total - 2} layers, what "
            f"stands after them), got {len(multipliers)}"
        )
