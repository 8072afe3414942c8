"""The spread over seeds, from made-up rows."""

from experiments import peft_compare, prefix_stability
from experiments.prefix_stability import BASE, SWEEP
from research.runs import override
from research.runs.canonical import run_id, to_json


def made_up():
    rows = []
    for overrides in SWEEP:
        config = override(BASE, overrides)
        number = 3 * (config.method != BASE.method) + config.seed
        metrics = {"accuracy": 0.5 + 0.1 * number, "nll": 0.9 - 0.1 * config.seed}
        metrics["trainable_parameters"] = 92_160
        rows.append(
            {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        )
        rows[-1]["overrides"] = to_json(overrides)
    return rows


def test_table_and_figure():
    lines = prefix_stability.table(made_up()).splitlines()
    assert lines[2] == "| MLP | 0.001 | 92,160 | 0.6 ± 0.1 | 0.500 | 0.8 ± 0.1 | 0.900 |"
    assert lines[3].startswith("| keys and values themselves | 0.01 | 92,160 | 0.9 ± 0.1 | 0.800 |")
    accuracy, nats = prefix_stability.figure(made_up()).axes
    assert [len(line.get_xdata()) for line in accuracy.lines] == [3, 1, 3, 1]
    assert nats.lines[0].get_xdata().tolist() == [0.9, 0.8, 0.9 - 0.2]


def test_the_task_is_that_of_the_comparison():
    ours, theirs = to_json(BASE), to_json(peft_compare.BASE)
    assert {name for name in ours if ours[name] != theirs[name]} == {"type", "method"}
