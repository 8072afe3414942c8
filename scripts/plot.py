"""The figure of an experiment, from its committed rows.

    python -m scripts.plot NAME [--format png]     writes experiments/results/NAME.svg

An experiment that defines `figure(rows) -> matplotlib Figure` is drawn by it. Without one, the
curves are drawn of the runs whose directory runs/<id>/ is on this machine (metrics.jsonl in it).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from research.report.sections import NOT_CURVES, TITLES, Series, series
from research.runs import results
from research.runs.environment import ROOT
from research.train import metrics
from scripts.tabulate import RESULTS, experiment_function, load


def curves(rows: Sequence[results.Row], runs: Path) -> dict[str, Series]:
    """{label of the run: its series} for the rows whose curves are under `runs`."""
    found = {}
    for row in rows:
        path = runs / row["id"] / "metrics.jsonl"
        if path.exists():
            shown = " ".join(f"{name}={value}" for name, value in row["overrides"].items())
            found[shown or row["id"]] = series(metrics.read(path))
    return found


def draw(found: Mapping[str, Series]) -> Figure:
    """A panel a metric, a line a run; names that TITLES does not know come last. SystemExit without a curve."""
    names = dict.fromkeys(name for run in found.values() for name in run)
    names = [name for name in names if name not in NOT_CURVES]
    if not names:
        raise SystemExit("the runs' metrics.jsonl hold no curve to draw")
    ordered = sorted(names, key=lambda name: (name not in TITLES, names.index(name)))
    columns = min(2, len(ordered))
    lines = -(-len(ordered) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, name in zip(axes.flat, ordered, strict=False):
        for label, run in found.items():
            if name in run:
                axis.plot(*zip(*run[name], strict=True), label=label, linewidth=1.3)
        axis.set_title(TITLES.get(name, name), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(ordered) :]:
        axis.remove()
    axes.flat[0].legend(fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes the figure so that the same rows give the same bytes."""
    stamp = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "results"}):
        figure.savefig(path, dpi=150, metadata=stamp)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.plot", description=__doc__)
    parser.add_argument("name", help="the experiment: experiments/NAME.py")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args(arguments)
    rows = load(options.name)
    figure = experiment_function(options.name, "figure")
    if figure is not None:
        drawing = figure(rows)
    else:
        found = curves(rows, ROOT / "runs")
        if not found:
            raise SystemExit(
                f"experiments/{options.name}.py has no figure(rows), and the curves of its "
                f"{len(rows)} runs are not on this machine (runs/<id>/metrics.jsonl)"
            )
        drawing = draw(found)
    path = RESULTS / f"{options.name}.{options.format}"
    save(drawing, path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
