"""The page of samples: what an experiment makes of the runs that are here, and clear refusals."""

import pytest

from scripts import samples

ROWS = [{"id": "one"}, {"id": "two"}]


def test_the_experiment_sees_the_rows_whose_runs_are_here(tmp_path, monkeypatch):
    (tmp_path / "two").mkdir()
    own = lambda rows, runs: f"\n{rows[0]['id']} of {len(rows)} in {runs.name}\n"  # noqa: E731
    monkeypatch.setattr(samples, "experiment_function", lambda name, function: own)
    text = samples.page("question", ROWS, tmp_path)
    assert text == f"# question: what the models said\n\ntwo of 1 in {tmp_path.name}\n"


def test_no_run_and_no_function_are_said(tmp_path):
    with pytest.raises(SystemExit, match="none of the 2 runs of alpaca has its directory"):
        samples.page("alpaca", ROWS, tmp_path)
    with pytest.raises(SystemExit, match=r"lora_rank\.py has no function samples"):
        samples.page("lora_rank", ROWS, tmp_path)
