"""The quickstart without weights: where things go and what it says; the training itself is faked."""

import importlib.util
import json
import re

import pytest

from experiments import sft_smollm2
from research.runs.environment import ROOT
from scripts import quickstart, report


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root of its own; `run` leaves an adapter and two metrics."""
    calls = []

    def run(config, directory):
        calls.append(directory)
        (directory / "adapter").mkdir()
        return {"before/nll": 2.0, "after/nll": 1.5}

    run.__module__ = sft_smollm2.__name__
    monkeypatch.setattr(sft_smollm2, "run", run)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    run.calls = calls
    return tmp_path


def row_of(path):
    (line,) = path.read_text().splitlines()
    return json.loads(line)


def test_summary_points_at_files_and_commands_that_exist(root, capsys):
    quickstart.quickstart([])
    said = capsys.readouterr().out
    row = row_of(root / "runs/quickstart/rows.jsonl")
    directory = f"runs/quickstart/{row['id']}"
    assert "2.0000 before, 1.5000 after" in said
    for name in ("report.html", "adapter"):
        assert f"{directory}/{name}" in said and (root / directory / name).exists()
    (module,) = re.findall(r"-m (\S+) --adapter", said)
    assert importlib.util.find_spec(module) is not None
    assert "quickstart" in (ROOT / "scripts/quickstart.sh").read_text()
    assert not (root / "experiments").exists()


def test_report_finds_the_row(root):
    quickstart.quickstart([])
    row = row_of(root / "runs/quickstart/rows.jsonl")
    assert (
        report.main([row["id"]], root=root) == root / "runs/quickstart" / row["id"] / "report.html"
    )


def test_smoke_stays_under_runs_smoke(root, capsys):
    quickstart.quickstart(["--smoke"])
    row = row_of(root / "runs/smoke/sft_smollm2.jsonl")
    assert f"runs/smoke/{row['id']}/report.html" in capsys.readouterr().out
    assert (root / "runs/smoke" / row["id"] / "report.html").exists()
    assert not (root / "runs/quickstart").exists()


def test_a_finished_run_is_not_run_again(root, capsys):
    quickstart.quickstart([])
    capsys.readouterr()
    before = len(sft_smollm2.run.calls)
    quickstart.quickstart([])
    said = capsys.readouterr().out
    assert "done already" in said and "report.html" in said
    assert len(sft_smollm2.run.calls) == before == 1


def test_arguments_that_make_no_sense_here(root, capsys):
    with pytest.raises(SystemExit):
        quickstart.quickstart(["--sweep"])
    assert "there is no sweep here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quickstart.quickstart(["--smok"])
    assert not (root / "runs").exists()
