"""Learning and forgetting from made-up rows, and the curve from a file of metrics."""

import json

import numpy as np
import pytest

from experiments import catastrophic_probe
from experiments.catastrophic_probe import BASE, GENERAL, METHODS, SWEEP, curve, points
from research.runs import override
from research.runs.canonical import run_id, to_json


def losses(answers, general):
    return {"answers": answers, "general": general, **dict.fromkeys(GENERAL, general + 1)}


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"rows": "other"}]):
        config = override(BASE, overrides) if "rows" not in overrides else BASE
        if config.steps:
            at = {8: losses(2.0 - 0.1 * number, 3.0 + 0.01 * number)}
            at[16] = losses(2.0 - 0.2 * number, 3.0 + 0.05 * number)
        else:
            at = {0: losses(2.0, 3.0)}
        metrics = {f"{step}/{name}": v for step, each in at.items() for name, v in each.items()}
        metrics |= {"exam": 0.5, "exam_low": 0.4, "exam_high": 0.6}
        json_config = to_json(config)
        if "rows" in overrides:  # other data: not of the sweep
            json_config["rows"] = "elsewhere:rows"
        row = {"id": run_id("made_up", config) + str(number), "config": json_config}
        rows.append(row | {"overrides": to_json(overrides), "metrics": metrics})
    return rows


def test_learning_and_forgetting_are_changes_since_the_start():
    found = points(made_up())
    assert list(found) == list(METHODS)
    assert found["LoRA, 5e-4"][8]["learned"].mean == pytest.approx(0.1)
    assert found["LoRA, 5e-4"][16]["forgotten"].mean == pytest.approx(0.05)
    last = found["all weights, 1e-4"][16]
    assert last["learned"].mean == pytest.approx(0.6)
    assert last["bible"].mean == pytest.approx(0.15) and last["bible"].count == 1


def test_table_and_figure():
    lines = catastrophic_probe.table(made_up()).splitlines()
    assert lines[0] == "| trained | steps | learned | forgotten | plays | bible | wiki | exam |"
    assert lines[2] == "| (before) | 0 | 2 | 3 | 4 | 4 | 4 | 0.50 (0.40–0.60) |"
    assert lines[3] == "| LoRA, 5e-4 | 8 | 0.1 | 0.01 | 0.01 | 0.01 | 0.01 |  |"
    assert lines[4].endswith("| 0.05 | 0.50 (0.40–0.60) |") and len(lines) == 9 + 3
    axes = catastrophic_probe.figure(made_up()).axes[0]
    np.testing.assert_allclose(axes.lines[1].get_xdata(), [0, 0.2, 0.4])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [0, 0.02, 0.1], atol=1e-12)


def test_the_curve_is_every_evaluation_by_its_step(tmp_path):
    rows = [
        {"step": 4, "split": "train", "loss": 9.0},
        {"step": 12, "split": "eval", **losses(2.0, 3.0)},
        {"step": 24, "split": "eval", **losses(1.0, 4.0), "seconds": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = curve(tmp_path)
    assert found["12/answers"] == 2.0 and found["24/general"] == 4.0 and found["24/wiki"] == 5.0
    assert len(found) == 2 * (2 + len(GENERAL))
