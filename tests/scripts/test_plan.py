"""The planner's command line: what it prints, what it refuses, and its check against real steps."""

import pytest

from research.models.families.llama import llama
from research.plan.devices import Device
from research.plan.work import METHODS, Work
from scripts import plan
from scripts.planning import check, running

TINY = llama(96, 3, 64, 4, 2, 128, max_length=128)


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    monkeypatch.setitem(plan.PRESETS, "tiny", TINY)
    monkeypatch.setattr(running, "SMALL", TINY)


def said(capsys, *arguments):
    plan.main(["--model", "tiny", "--length", "32", *arguments])
    return capsys.readouterr().out


def test_a_plan_for_eight_accelerators(capsys):
    out = said(capsys, "--method", "lora", "--devices", "8xh100", "--batch", "16")
    head = "tiny, lora, 8 × h100 (1 × fsdp 8), 16 rows of 32 tokens"
    assert out.startswith(head)
    for name in ("parameters", "gradients", "optimizer state", "activations, temporaries", "total"):
        assert f"  {name} " in out
    assert "memory of a h100" in out and "fits: 0% of it" in out
    assert "estimate: data sheet, assumed 40% of 989 TFLOP/s, 3,350 GB/s" in out


def test_a_model_that_is_too_large_does_not_fit(capsys, monkeypatch):
    small = Device("toy", 1e5, 1e12, 1e12, 1e12)
    monkeypatch.setattr(plan, "devices", lambda text: (1, small))
    assert "does not fit" in said(capsys, "--batch", "2", "--devices", "toy")


def test_a_cpus_speed_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(running.limits, "measure", lambda *a, **k: LIMITS)
    monkeypatch.setattr(plan, "measured_cpu", lambda method: running.measured_cpu(method, rounds=1))
    assert "measured here" in said(capsys, "--devices", "cpu", "--batch", "2")


LIMITS = {"matmul_gflop_s": 100.0, "copy_gb_s": 1e3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama-7b"], "no model 'lama-7b'; there are llama-7b"),
        (["--method", "lor"], "no method 'lor'; there are lora"),
        (["--devices", "8xh10"], "no device 'h10'"),
        (["--devices", "8xh100", "--batch", "12"], "12 rows do not divide over 8 devices"),
        (["--devices", "8xh100", "--copies", "3"], "3 copies of the model do not divide 8 devices"),
        (["--devices", "h100", "--length", "129"], "1 to 128 tokens"),
    ],
)
def test_bad_input_ends_with_a_message(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        said(capsys, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_memory_and_flops_are_checked_against_steps_that_are_taken(monkeypatch):
    monkeypatch.setattr(running.limits, "measure", lambda *a, **k: LIMITS)
    cases = {"lora, 2×32": Work(TINY, METHODS["lora"], 2, 32)}
    (row,) = check.check(cases, rounds=2).rows
    assert set(row.missed) <= {"seconds"}  # other programs may be running
    assert row.pairs["held"][0] > 0 and row.pairs["seconds"][1] > 0


def test_a_goal_that_is_missed_is_named():
    good = {what: (100.0, 101.0) for what in check.GOALS}
    rows = [check.Row("a", good), check.Row("b", good | {"seconds": (100.0, 160.0)})]
    text = check.table(rows)
    assert rows[1].missed == ["seconds"] and rows[1].ratio("seconds") == pytest.approx(0.625)
    assert "(0.62)" in text and text.endswith("missed: b: seconds")
    assert "all within the goals" in check.table(rows[:1])
