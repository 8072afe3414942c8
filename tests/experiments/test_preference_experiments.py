"""Tables and figures of the preference experiments from made-up rows, and what KTO's answers are."""

import numpy as np
import pytest

from experiments import kto_imbalance, preference_losses
from experiments.shared import preference_pairs
from research.runs import override
from research.runs.canonical import to_json


def made_up(experiment):
    rows = []
    for number, overrides in enumerate(experiment.SWEEP):
        measured = {key: number + 0.25 for key in experiment.COLUMNS.values()}
        config = to_json(override(experiment.BASE, overrides))
        row = {"id": str(number), "config": config, "metrics": measured}
        rows.append(row | {"overrides": overrides, "seed": 0})
    return rows


@pytest.mark.parametrize("experiment", [preference_losses, kto_imbalance])
def test_a_line_for_each_run(experiment):
    rows = made_up(experiment)
    lines = experiment.table(rows).split("\n\n")[0].splitlines()[2:]
    assert len(lines) == len(rows)
    assert sorted(float(line.split("|")[-2]) for line in lines) == [
        number + 0.25 for number in range(len(rows))
    ]
    assert len(experiment.figure(rows).axes) == 2


def test_every_pair_loss_is_in_the_sweep():
    assert preference_losses.PAIR_LOSSES.keys() <= set(preference_losses.NAMES)


@pytest.mark.weights
@pytest.mark.data
@pytest.mark.parametrize(("bad_per_good", "good"), [(1, 11), (3, 4), (10, 1)])
def test_good_answers_are_left_out_and_bad_ones_kept(bad_per_good, good):
    train, held_out = preference_pairs.split(60, 36)
    assert len(train) == 11 and len(held_out) == 36
    table = kto_imbalance.answers(60, 36, 80, bad_per_good)
    assert np.count_nonzero(table["good"]) == good
    assert np.count_nonzero(~table["good"]) == 11
