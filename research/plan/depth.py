"""What a deep model costs, from shallow ones: each stack two and three times its pattern.

A scanned stack is one loop, whose memory grows by the same for each round; layers one after another
add the same arithmetic each. So two programs say what a model of one stack costs at any depth, and one
more for each further stack.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

Counts = tuple[int, ...]

# A loop of one round is no loop to XLA, and has another memory.
FIRST = 2


def in_depth(value: Callable[[Counts], float], counts: Counts, whole: bool = False) -> float:
    """`value(counts)`, from counts of 2 and 3; really asked for when `whole`, or when not deeper."""
    if whole or max(counts) <= FIRST + 1:
        return value(counts)
    value = cache(value)
    shallow = tuple(min(count, FIRST) for count in counts)
    total = value(shallow)
    for place, count in enumerate(counts):
        if more := count - shallow[place]:
            total += more * (value(_with_one_more(shallow, place)) - value(shallow))
    return total


def _with_one_more(counts: Counts, place: int) -> Counts:
    return (*counts[:place], counts[place] + 1, *counts[place + 1 :])
