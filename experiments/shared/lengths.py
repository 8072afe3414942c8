"""Held-out loss by the tokens in a window: what reaches beyond the length that was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes

from research.runs import results


def scores(group: results.Group, lengths: Sequence[int]) -> dict[int, results.Statistic]:
    """Held-out nats a token by length, for those of `lengths` that the model has positions for."""
    has = results.metrics(group.rows[0])
    return {n: group.statistic(f"nll/{n}") for n in lengths if f"nll/{n}" in has}


def draw(axes: Axes, groups: Mapping[str, results.Group], lengths: Sequence[int]) -> None:
    """A line for each of {label: runs}: mean and standard deviation at each length, log scale.

    Markers are hollow and differ, so that one on another is seen.
    """
    for marker, (label, group) in zip(cycle("os^Dv"), groups.items(), strict=False):
        found = scores(group, lengths)
        spread = [statistic.std or 0 for statistic in found.values()]
        means = [statistic.mean for statistic in found.values()]
        look = {"marker": marker, "markerfacecolor": "none", "capsize": 3}
        axes.errorbar(list(found), means, yerr=spread, label=label, **look)
    axes.set(xscale="log", xlabel="tokens in a window", ylabel="held-out nats a token")
    axes.set_xticks(lengths)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
