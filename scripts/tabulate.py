"""The table of an experiment, from its committed rows.

    python -m scripts.tabulate NAME          prints it and writes experiments/results/NAME.md

Mean ± sample standard deviation (ddof = 1) over seeds, with the count of seeds. An experiment that
defines `table(rows) -> str` (Markdown) is shown that way instead. The rows are all that is read, so
the same rows give the same table anywhere.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from research.runs import results
from research.runs.environment import ROOT

RESULTS = ROOT / "experiments" / "results"


def load(name: str, directory: Path = RESULTS) -> list[results.Row]:
    """The latest rows of an experiment; SystemExit when there are none."""
    path = directory / f"{name}.jsonl"
    rows = results.latest(results.read(path))
    if not rows:
        have = (
            ", ".join(sorted(p.stem for p in directory.glob("*.jsonl") if p.stem != "bench"))
            or "none"
        )
        raise SystemExit(f"{path} has no rows; experiments with results: {have}")
    return rows


def experiment_function(name: str, function: str) -> Callable | None:
    """`function` of experiments/NAME.py, None when it has none; SystemExit without the module."""
    try:
        module = importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"experiments.{name}":
            raise
        raise SystemExit(f"there is no experiments/{name}.py") from error
    return getattr(module, function, None)


def page(name: str, rows: Sequence[results.Row], table: Callable | None) -> str:
    """The Markdown file: the table, and which rows it is made of."""
    body = table(list(rows)) if table is not None else results.markdown(rows)
    commits = sorted({(row["git"]["commit"] or "no commit")[:10] for row in rows})
    dirty = sum(bool(row["git"]["dirty"]) for row in rows)
    note = f"{len(rows)} runs at {', '.join(commits)}"
    note += f", {dirty} of them with uncommitted changes" if dirty else ""
    return (
        f"# {name}\n\n{body.strip()}\n\n{note}. "
        f"± is the sample standard deviation over seeds (ddof = 1).\n"
        f"Made by `python -m scripts.tabulate {name}` from `{name}.jsonl`.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.tabulate", description=__doc__)
    parser.add_argument("name", help="the experiment: experiments/NAME.py")
    name = parser.parse_args(arguments).name
    text = page(name, load(name), experiment_function(name, "table"))
    path = RESULTS / f"{name}.md"
    path.write_text(text)
    print(text)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
