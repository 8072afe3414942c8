"""What the models of an experiment said, from the directories of its runs.

    python -m scripts.samples NAME       prints it and writes experiments/results/NAME_samples.md

For experiments that define `samples(rows, runs) -> str` (Markdown). The answers are in runs/<id>/,
which only the machine that made the runs has; rows whose directory is not there are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from research.runs.environment import ROOT
from scripts.tabulate import RESULTS, experiment_function, load


def page(name: str, rows: Sequence[dict], runs: Path) -> str:
    """The Markdown file; SystemExit when the experiment has no samples or no run is here."""
    samples = experiment_function(name, "samples")
    if samples is None:
        raise SystemExit(f"experiments/{name}.py has no function samples")
    here = [row for row in rows if (runs / row["id"]).is_dir()]
    if not here:
        raise SystemExit(f"none of the {len(rows)} runs of {name} has its directory in {runs}")
    return f"# {name}: what the models said\n\n{samples(here, runs).strip()}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.samples", description=__doc__)
    parser.add_argument("name", help="the experiment: experiments/NAME.py")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs are")
    options = parser.parse_args(arguments)
    text = page(options.name, load(options.name), options.runs)
    path = RESULTS / f"{options.name}_samples.md"
    path.write_text(text)
    print(text)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
