"""The page of one run, from its row and its directory.

    python -m scripts.report RUN_ID          writes runs/RUN_ID/report.html

Curves come from runs/RUN_ID/metrics.jsonl, answers from runs/RUN_ID/samples.jsonl
({"prompt", "before", "after"} a line), and the comparison from the row's metrics: each pair
`before/NAME` and `after/NAME`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research import report
from research.runs import results
from research.runs.environment import ROOT
from research.train import metrics

LOWER = ("nll", "loss", "perplexity", "bits_per_byte", "error")
HIGHER = ("accuracy", "reward", "score", "win_rate")


def find(run_id: str, root: Path) -> tuple[results.Row, Path]:
    """The row of a run and its directory; SystemExit when there is no such row."""
    places = [(root / "experiments/results", root / "runs"), (root / "runs/smoke",) * 2]
    for rows, runs in places:
        path = rows / f"{run_id.rpartition('-')[0]}.jsonl"
        for row in results.latest(results.read(path)):
            if row["id"] == run_id:
                return row, runs / run_id
    raise SystemExit(f"no row {run_id!r} in experiments/results/ or runs/smoke/")


def comparison(row: results.Row) -> list[dict[str, Any]]:
    """before_after rows of the metrics that come as a pair."""
    found = results.metrics(row)
    pairs = []
    for name, before in found.items():
        measure = name.removeprefix("before/")
        if measure == name or f"after/{measure}" not in found:
            continue
        pair = {"name": measure, "before": before, "after": found[f"after/{measure}"]}
        for better, words in (("lower", LOWER), ("higher", HIGHER)):
            if any(word in measure for word in words):
                pair["better"] = better
        pairs.append(pair)
    return pairs


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> Path:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__)
    parser.add_argument("run_id", help="the id of a finished run, as --list shows it")
    row, directory = find(parser.parse_args(arguments).run_id, root)
    files = {name: directory / f"{name}.jsonl" for name in ("metrics", "samples")}
    lines = {name: metrics.read(path) if path.exists() else [] for name, path in files.items()}
    path = directory / "report.html"
    report.write(path, row, lines["metrics"], comparison(row), lines["samples"])
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
