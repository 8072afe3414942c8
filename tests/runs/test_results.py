import json
import math
import os

import pytest

from research.runs import results


def row(id, seed, loss, **overrides):
    config = {"type": "m:C", "seed": seed, **overrides}
    return {
        "id": id,
        "seed": seed,
        "config": config,
        "overrides": {**overrides, "seed": seed},
        "metrics": {"eval": {"nll": loss}, "answer": "text", "done": True},
    }


def test_append_then_read_gives_the_rows_back(tmp_path):
    path = tmp_path / "results" / "x.jsonl"
    assert results.read(path) == []
    rows = [row("a", 0, 1.0), row("b", 1, 2.0)]
    for each in rows:
        results.append(path, each)
    assert results.read(path) == rows


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    results.append(path, row("a", 0, 1.0))
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.append(path, row("b", 0, 1.0))
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ['{"id": "a"', "[1]", '{"no": "id"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row("a", 0, 1.0)) + "\n" + line + "\n")
    with pytest.raises(results.ResultsError, match=r"x\.jsonl:2: "):
        results.read(path)


def test_the_latest_row_of_an_id_counts():
    rows = [row("a", 0, 1.0), row("b", 1, 2.0), row("a", 0, 9.0)]
    assert [(r["id"], r["metrics"]["eval"]["nll"]) for r in results.latest(rows)] == [
        ("a", 9.0),
        ("b", 2.0),
    ]


def test_groups_are_configs_apart_from_the_seed_and_std_has_one_degree_less():
    rows = [row("a", 0, 1.0, rank=1), row("b", 1, 3.0, rank=1), row("c", 0, 5.0, rank=2)]
    one, two = results.groups(rows)
    assert (one.overrides, two.overrides) == ({"rank": 1}, {"rank": 2})
    found = one.statistic("eval/nll")
    # (1, 3): mean 2, squared deviations 1 + 1, over n - 1 = 1.
    assert (found.mean, found.count) == (2.0, 2)
    assert found.std == pytest.approx(math.sqrt(2))
    assert two.statistic("eval/nll") == results.Statistic(5.0, None, 1)
    with pytest.raises(KeyError, match="no row"):
        one.statistic("accuracy")


def test_table_shows_overrides_seeds_and_mean_with_spread():
    rows = [row("a", 0, 1.0, rank="a|b"), row("b", 1, 3.0, rank="a|b"), row("c", 0, 5.0, rank=2)]
    assert results.markdown(rows, ["eval/nll"]).splitlines() == [
        "| rank | seeds | eval/nll |",
        "| --- | --- | --- |",
        "| a\\|b | 2 | 2 ± 1.41 |",
        "| 2 | 1 | 5 |",
    ]


def test_metrics_are_the_numbers_with_nested_names():
    assert results.metrics({"metrics": {"a": {"b": 1}, "c": "nan", "d": "text", "e": True}}) == {
        "a/b": 1,
        "c": pytest.approx(math.nan, nan_ok=True),
        "e": 1.0,
    }


def test_components_and_functions_are_shown_by_name_and_text_as_it_is():
    shown = {"m.n:AdamW": "AdamW", "a: b": "a: b", "https://x": "https://x", "8": "8", "": ""}
    assert {text: results.brief(text) for text in shown} == shown
    assert results.brief({"type": "m:Lion", "lr": 1}) == "Lion"
    assert results.brief([1, 2]) == "1,2"
