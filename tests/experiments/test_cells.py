"""Tables and figures of swept rows, from rows made up here."""

import importlib

import pytest
from matplotlib.figure import Figure

from experiments.shared.cells import cells
from research.runs import override, results
from research.runs.canonical import run_id, to_json

NAMES = {
    "attention_variants": ("nll/256", "parameters", "cache_bytes", "train_tokens_per_s"),
    "gqa_uptrain": (),
    "position_ablation": ("nll/128", "nll/256"),
    "family_shootout": ("nll/128", "nll/256", "parameters", "ffn", "train_tokens_per_s"),
    "norm_residual_depth": ("nll/128", "gradient/first", "gradient/last"),
    "training_recipe": ("nll/128", "diverged", "log_partition", "largest_logit"),
}


def made_up(experiment, names):
    names = [*names, "decode_tokens_per_s"]
    if hasattr(experiment, "names"):
        names += [
            f"{at}/{n}" for *_, n in experiment.names(experiment.BASE) for at in ("before", "after")
        ]
    rows = []
    for number, overrides in enumerate(experiment.SWEEP):
        config = override(experiment.BASE, overrides)
        row = {"id": run_id("made_up", config), "config": to_json(config)}
        row |= {"overrides": to_json(overrides), "metrics": dict.fromkeys(names, 1.0 + number)}
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_every_swept_run_is_in_the_table_and_the_figure(name):
    experiment = importlib.import_module(f"experiments.{name}")
    rows = made_up(experiment, NAMES[name])
    stray = rows[0] | {"id": "stray", "config": rows[0]["config"] | {"seed": 9, "recipe": {}}}
    table = experiment.table([*rows, stray])
    seeds = len({row["config"]["seed"] for row in rows})
    groups = len(rows) // seeds
    if name != "gqa_uptrain":
        assert table.count("\n| ") - 1 == groups
    assert "1.5 ± 0.707" in table and "None" not in table  # seeds 0 and 1 of the first group
    assert isinstance(experiment.figure(rows), Figure)


def test_cells_are_in_the_order_of_the_labels():
    experiment = importlib.import_module("experiments.norm_residual_depth")
    rows = made_up(experiment, ["nll/128"])
    found = cells(rows[::-1], experiment.BASE, form=experiment.FORMS, layers=experiment.DEPTHS)
    assert list(found)[:3] == [("post-norm", "6"), ("post-norm", "18"), ("pre-norm", "6")]
    assert found["pre-norm", "18"].statistic("nll/128") == results.summary([13.0, 14.0])


def test_cells_by_a_field_inside_another():
    experiment = importlib.import_module("experiments.training_recipe")
    rows = made_up(experiment, ["nll/128"])
    decays = {"none": 0.0, "0.1": 0.1}
    found = cells(rows, experiment.BASE, **{"recipe.weight_decay": decays})
    assert list(found) == [("none",), ("0.1",)]  # and neither decay 1 nor other changes
    assert found["0.1",].statistic("nll/128") == results.summary([1.0, 2.0])
    assert [row["config"]["recipe"]["weight_decay"] for row in found["none",].rows] == [0.0, 0.0]
    assert cells(rows, experiment.BASE, **{"recipe.lr": {"other": 1.0}}) == {}
