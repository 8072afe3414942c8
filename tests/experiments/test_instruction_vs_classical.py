"""The table and figure of made-up rows; every form sees the same headlines as often."""

import pytest

from experiments import instruction_vs_classical
from experiments.instruction_vs_classical import BASE, FORMS, SWEEP
from research.runs import override
from research.runs.canonical import run_id, to_json


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"steps": 5}]):
        config = override(BASE, overrides)
        metrics = {"accuracy": 0.5 + 0.01 * number}
        if config.form is not None:
            metrics |= {"other_accuracy": 0.55, "other_nll": 0.7 - 0.01 * number}
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_the_sweep_has_each_form_at_each_size_and_no_untrained_head():
    configs = [override(BASE, each) for each in SWEEP]
    sizes = {form: [c.train for c in configs if c.form is form] for form in FORMS.values()}
    assert sizes.pop(None) == [16, 256]
    assert set(map(tuple, sizes.values())) == {(0, 16, 256)}
    assert BASE.steps * BASE.batch_size == max(c.train for c in configs)


def test_table_and_figure():
    rows = made_up()
    task, other = instruction_vs_classical.table(rows).split("\n\n")[::2]
    lines = task.splitlines()
    assert lines[2] == "| classification head | – | 0.52 | 0.55 |"
    assert lines[4] == "| chat | 0.51 | 0.54 | 0.57 |"
    assert other.splitlines()[3] == "| label words | nats of the answer | 0.7 | 0.67 | 0.64 |"
    left, right = instruction_vs_classical.figure(rows).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(FORMS)
    assert list(left.containers[0].lines[0].get_xdata()) == [16, 256]
    assert list(right.containers[1].lines[0].get_ydata()) == pytest.approx([0.69, 0.66, 0.63])
    colours = [[c.lines[0].get_color() for c in axes.containers] for axes in (left, right)]
    assert colours[1] == colours[0][1:] and len(set(colours[0])) == 3
