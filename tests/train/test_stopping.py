"""Early stopping by hand-made evaluations; stopped in between and resumed."""

from functools import partial

import pytest
from perceptron import assert_bitwise, objective, params, source

from research.train.loop import Training, fit
from research.train.metrics import read
from research.train.optim import SGD
from research.train.retention import Best
from research.train.stopping import EarlyStopping, Waiting
from research.types import Source

NAN = float("nan")


def waits(stopping, values):
    waiting, found = Waiting(), []
    for value in values:
        waiting = stopping.after(waiting, {"nll": value})
        found.append(waiting.evaluations)
    return found


def test_evaluations_since_the_best_by_hand():
    values = [3.0, 2.0, 2.5, 2.0, 1.95, 1.0, NAN, 1.5]
    assert waits(EarlyStopping(Best("nll")), values) == [0, 0, 1, 2, 0, 0, 1, 2]
    assert waits(EarlyStopping(Best("nll"), min_delta=0.1), values) == [0, 0, 1, 2, 3, 0, 1, 2]
    highest = EarlyStopping(Best("nll", "highest"))
    assert waits(highest, [1.0, 2.0, 1.5, 2.5]) == [0, 0, 1, 0]
    two = EarlyStopping(Best("nll"), patience=2)
    assert not two.stops(Waiting(1.0, 1))
    assert two.stops(Waiting(1.0, 2))


def falling(values, seen=None):
    """An `evaluate` that goes through `values`; every call is noted."""
    seen = [] if seen is None else seen

    def evaluate(params):
        seen.append(values[len(seen)])
        return {"nll": seen[-1]}

    return evaluate


VALUES = [3.0, 2.0, 2.5, 1.5, 1.6, 1.7, 1.0, 0.5]


def run(directory, evaluate, steps=20, source=source(), patience=2, **options):
    config = Training(
        steps=steps,
        eval_every=2,
        early_stopping=EarlyStopping(Best("nll"), patience),
        directory=directory,
        **options,
    )
    return fit(objective, source, params(), SGD(0.01), config, evaluate=evaluate)


def test_a_run_ends_after_its_patience_and_says_so(tmp_path, capsys):
    """The best is the fourth evaluation, of step 8; two later, at step 12, it is over."""
    fitted = run(tmp_path, falling(VALUES))
    assert int(fitted.state.step) == 12
    assert fitted.evaluation == {"nll": 1.7}
    row = {"step": 12, "split": "stop", "evaluations_without_a_better": 2}
    assert read(tmp_path / "metrics.jsonl")[-1] == row
    assert "stopped early after step 12" in capsys.readouterr().out
    assert_bitwise(run(tmp_path, falling([])).state, fitted.state)  # not run again
    assert read(tmp_path / "metrics.jsonl")[-1] == row
    assert int(run(tmp_path, falling([9.0] * 9), patience=3).state.step) == 14


class Stop(Exception):
    pass


def killed_at(step):
    inner = source()

    def next_batch(state, *rest):
        if state["position"] == step:
            raise Stop
        return inner.next(state, *rest)

    return Source(inner.init, next_batch)


@pytest.mark.parametrize("step", [5, 11])
def test_resumed_it_ends_where_it_would_have(tmp_path, step):
    """Killed after the second or the fifth evaluation, which are in the checkpoint before."""
    whole = run(tmp_path / "whole", falling(VALUES))
    part = partial(run, tmp_path / "killed", save_every=2)
    seen = []
    with pytest.raises(Stop):
        part(falling(VALUES, seen), source=killed_at(step))
    resumed = part(falling(VALUES, seen))
    assert seen == VALUES[:6]
    assert_bitwise(resumed.state, whole.state)
    rows = [
        [(r["step"], r["split"]) for r in read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]


def test_without_an_end_to_gains_it_runs_to_its_steps():
    assert int(run(None, falling([1 / n for n in range(1, 20)])).state.step) == 20


def test_refusals():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        EarlyStopping(Best("nll"), 0)
    with pytest.raises(ValueError, match="min_delta must be at least 0"):
        EarlyStopping(Best("nll"), min_delta=-1.0)
    with pytest.raises(ValueError, match=r"needs Training.eval_every"):
        Training(2, early_stopping=EarlyStopping(Best("nll")))
    with pytest.raises(ValueError, match="needs an `evaluate`"):
        run(None, None)
    with pytest.raises(KeyError, match="nll"):
        run(None, lambda params: {"loss": 1.0})
