"""tabulate, plot and report: functions of rows, and what they say when there are none."""

import json

import pytest

from research.runs import results
from scripts import plot, report, tabulate


def row(seed, nll, rank, commit="a" * 40, dirty=False):
    id = f"question-{rank}{seed}"
    device = {"platform": "cpu", "kind": "cpu", "count": 1, "cpu": "CPU", "cores": 2}
    return {
        "id": id,
        "experiment": "question",
        "seed": seed,
        "overrides": {"rank": rank, "seed": seed},
        "config": {"type": "m:C", "rank": rank, "seed": seed},
        "metrics": {"before/nll": 2.0, "after/nll": nll, "after/alone": 1},
        "git": {"commit": commit, "dirty": dirty},
        "wall_s": 1.0,
        "peak_rss_bytes": 1,
        "started": "2026-01-01T00:00:00+00:00",
        "lock_sha256": "0" * 64,
        "versions": {},
        "device": device,
    }


ROWS = [row(0, 1.0, 4), row(1, 2.0, 4), row(0, 3.0, 8, commit="b" * 40, dirty=True)]


def test_page_says_mean_spread_count_and_where_the_rows_come_from():
    text = tabulate.page("question", ROWS, None)
    assert "| rank | seeds | before/nll | after/nll | after/alone |" in text
    assert "| 4 | 2 | 2 ± 0 | 1.5 ± 0.707 | 1 ± 0 |" in text
    assert "| 8 | 1 | 2 | 3 | 1 |" in text
    assert f"3 runs at {'a' * 10}, {'b' * 10}, 1 of them with uncommitted changes" in text
    assert "ddof = 1" in text


def test_an_experiments_own_table_is_used():
    assert "own 3" in tabulate.page("question", ROWS, lambda rows: f"own {len(rows)}")


def test_no_rows_and_no_experiment_are_said(tmp_path):
    results.append(tmp_path / "other.jsonl", ROWS[0])
    with pytest.raises(SystemExit, match=r"no rows; experiments with results: other"):
        tabulate.load("question", tmp_path)
    with pytest.raises(SystemExit, match=r"no experiments/no_such_question\.py"):
        tabulate.experiment_function("no_such_question", "table")


def test_plot_draws_a_panel_a_metric_and_a_line_a_run_that_is_here(tmp_path):
    for each in ROWS[:2]:
        directory = tmp_path / each["id"]
        directory.mkdir()
        lines = [{"step": s, "loss": 1.0 / s, "odd": s, "elapsed_s": s} for s in (1, 2, 3)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    found = plot.curves(ROWS, tmp_path)
    assert list(found) == ["rank=4 seed=0", "rank=4 seed=1"]
    figure = plot.draw(found)
    assert [axis.get_title() for axis in figure.axes] == ["Training loss", "odd"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 2]
    assert list(figure.axes[0].lines[0].get_ydata()) == [1.0, 0.5, 1 / 3]
    for name in ("one.svg", "two.svg"):
        plot.save(plot.draw(found), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_report_reads_the_runs_files(tmp_path):
    results.append(tmp_path / "experiments/results/question.jsonl", ROWS[0])
    directory = tmp_path / "runs" / ROWS[0]["id"]
    directory.mkdir(parents=True)
    (directory / "samples.jsonl").write_text(
        json.dumps({"prompt": "Who?", "before": "Nobody.", "after": "Somebody."}) + "\n"
    )
    path = report.main([ROWS[0]["id"]], root=tmp_path)
    assert path == directory / "report.html"
    assert "Somebody." in path.read_text()
    with pytest.raises(SystemExit, match="no row 'question-99'"):
        report.main(["question-99"], root=tmp_path)


def test_nothing_to_draw_is_said():
    with pytest.raises(SystemExit, match="no curve to draw"):
        plot.draw({"rank=4": {}})
