"""The page of one run again, from its row and its directory.

    python -m scripts.report RUN_ID          writes runs/RUN_ID/report.html

A run writes its page itself when it ends; this is for rows that were made elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from research.runs import page, results
from research.runs.environment import ROOT


def find(run_id: str, root: Path) -> tuple[results.Row, Path]:
    """The row of a run and its directory; SystemExit when there is no such row."""
    name = f"{run_id.rpartition('-')[0]}.jsonl"
    places = [
        (root / "experiments/results" / name, root / "runs"),
        (root / "runs/smoke" / name, root / "runs/smoke"),
        (root / "runs/quickstart/rows.jsonl", root / "runs/quickstart"),
    ]
    for path, runs in places:
        for row in results.latest(results.read(path)):
            if row["id"] == run_id:
                return row, runs / run_id
    raise SystemExit(f"no row {run_id!r} in experiments/results/, runs/smoke/ or runs/quickstart/")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> Path:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__)
    parser.add_argument("run_id", help="the id of a finished run, as --list shows it")
    path = page.write(*find(parser.parse_args(arguments).run_id, root))
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
