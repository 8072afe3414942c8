"""Every experiment runs end to end at its smallest size, and its sweep names real fields."""

import importlib
import math
from pathlib import Path

import pytest

from research.runs import main, results
from research.runs.command import plan

ROOT = Path(__file__).parents[2]
NAMES = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "__init__")


@pytest.fixture(params=NAMES)
def experiment(request):
    return importlib.import_module(f"experiments.{request.param}")


def start(experiment, root, *arguments):
    return main(
        experiment.BASE,
        experiment.SWEEP,
        experiment.run,
        getattr(experiment, "table", None),
        smoke=experiment.SMOKE,
        arguments=arguments,
        root=root,
    )


@pytest.mark.weights
@pytest.mark.data
def test_smoke(experiment, tmp_path):
    (row,) = start(experiment, tmp_path, "--smoke")
    found = results.metrics(row)
    assert found and all(math.isfinite(value) for value in found.values())
    assert (tmp_path / "runs/smoke" / row["id"] / "report.html").stat().st_size > 1_000
    assert not (tmp_path / "experiments").exists()


def test_sweep_overrides_real_fields_and_makes_distinct_runs(experiment, tmp_path, capsys):
    assert start(experiment, tmp_path, "--sweep", "--list") == []
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(experiment.SWEEP) and all(line.startswith("to do") for line in shown)


def test_committed_rows_are_of_planned_runs(experiment):
    """A result whose config is no longer what the sweep asks for is not a result of this code."""
    name = experiment.__name__.rpartition(".")[2]
    rows = results.latest(results.read(ROOT / "experiments/results" / f"{name}.jsonl"))

    class Options:
        sweep, smoke, set = True, False, ()

    planned = plan(name, experiment.BASE, experiment.SWEEP, Options, experiment.SMOKE)
    assert {row["id"] for row in rows} <= {each.id for each in planned}
    if hasattr(experiment, "table") and rows:
        assert experiment.table(rows).startswith("|")
