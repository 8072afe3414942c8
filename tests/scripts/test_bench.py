"""The benchmark's driver with workers that only pretend, its limits, and its table by hand."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from research.data.supervised import shift
from scripts import bench
from scripts.benchmark import limits, modes, ours, prepare, table

ROOT = Path(__file__).parents[2]

FAKE = """
import os, sys, time
from scripts.benchmark.worker import serve

name, log, check, lasts = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4].split(",")

def prepare():
    def repeat():
        number = lasts.pop(0)
        if number == "die":
            os._exit(7)
        with open(log, "a") as file:
            file.write(f"{name} begins\\n")
        time.sleep(0.02)
        with open(log, "a") as file:
            file.write(f"{name} ends\\n")
        return {"seconds": float(number), "work": 100}
    print("a library that chatters on stdout")
    return {"loss": check, "tokens": [1, 2]}, repeat

serve(prepare, ())
"""


@pytest.fixture
def fake(tmp_path):
    """A worker command from its name, check, and the seconds it will claim."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    log = tmp_path / "log"

    def command(name, check, lasts):
        return [sys.executable, str(script), name, str(log), str(check), lasts]

    command.log = log
    return command


def compare(*commands, repeats):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return bench.compare(*commands, repeats, lambda line: None, environ)


def test_repetitions_alternate_and_never_overlap(fake):
    found = compare(fake("A", 2.0, "1,2,4"), fake("B", 2.0005, "2,2,2"), repeats=3)
    turns = [f"{name} {what}" for _ in range(3) for name in "AB" for what in ("begins", "ends")]
    assert fake.log.read_text().splitlines() == turns
    assert [reply["seconds"] for reply in found["ours"]["repetitions"]] == [1, 2, 4]
    assert [reply["seconds"] for reply in found["theirs"]["repetitions"]] == [2, 2, 2]
    assert found["check"] == {"loss": [2.0, 2.0005], "tokens": [[1, 2], [1, 2]]}
    # A Python process holds more than a megabyte and less than a gigabyte.
    assert 1e6 < found["ours"]["peak_rss_bytes"] < 1e9


def test_workers_that_disagree_are_not_compared(fake):
    with pytest.raises(bench.WorkerError, match=r"differ in 'loss': 2.0 and 2.01"):
        compare(fake("A", 2.0, "1"), fake("B", 2.01, "1"), repeats=1)
    assert not fake.log.exists()


def test_a_worker_that_dies_is_named_with_its_status(fake):
    with pytest.raises(bench.WorkerError, match="worker theirs ended with status 7"):
        compare(fake("A", 2.0, "1,1"), fake("B", 2.0, "1,die"), repeats=2)


@pytest.mark.parametrize(
    ("ours", "theirs", "wrong"),
    [
        ({"loss": 1.0}, {"loss": float("nan")}, "loss"),
        ({"tokens": [1, 2]}, {"tokens": [1, 3]}, "tokens"),
        ({"tokens": [1]}, {}, "tokens"),
    ],
)
def test_what_does_not_agree(ours, theirs, wrong):
    with pytest.raises(bench.WorkerError, match=f"differ in '{wrong}'"):
        bench.agree(ours, theirs)


def test_without_reference_libraries_it_says_how_to_get_them(tmp_path):
    missing = str(tmp_path / "python")
    with pytest.raises(SystemExit, match=r"scripts/references\.sh"):
        bench.main(["--reference", missing, "--output", str(tmp_path / "rows.jsonl")])


def test_quick_is_one_repetition_and_none_is_refused():
    assert bench.parse(["--quick", "--repeats", "9"]).repeats == 1
    assert bench.parse([]).modes == list(modes.MODES)
    with pytest.raises(SystemExit):
        bench.parse(["--repeats", "0"])


def test_limits_are_measured():
    found = limits.measure(threads=2, side=64, words=1 << 12, tries=1)
    assert set(found) == {"matmul_gflop_s", "read_gb_s", "copy_gb_s"}
    assert all(np.isfinite(value) and value > 0 for value in found.values())


def test_least_times_by_hand():
    """134,479,872 weights in the products: 0.5379 GB a token, 825.6 GFLOP for 1020 of 1024 losses."""
    assert modes.TRUNK + modes.HEAD == 134_479_872
    machine = {"matmul_gflop_s": 100.0, "read_gb_s": 20.0}
    one = {"work": 64, "steps": 64}
    assert modes.limit_s(modes.MODES["decode1"], one, machine) == pytest.approx(64 * 0.0268959744)
    # 8 rows need 64 * 8 * 0.26896 = 137.7 GFLOP, 1.377 s: less than the 1.721 s of reading.
    eight = {"work": 512, "steps": 64}
    assert modes.limit_s(modes.MODES["decode8"], eight, machine) == pytest.approx(1.7213423)
    step = {"work": 1024, "steps": 1, "tokens": 1024, "supervised": 1024}
    assert modes.limit_s(modes.MODES["full4x256"], step, machine) == pytest.approx(8.2624433)
    # 4/6 of that, and six times 4,884,480 factors: 580.8 GFLOP.
    assert modes.FACTORS == 4_884_480
    assert modes.limit_s(modes.MODES["lora4x256"], step, machine) == pytest.approx(5.8083934)


def row(mode="decode1", quick=False, ours=(1.0, 2.0, 4.0), theirs=(3.0, 3.0, 3.0), cpu="CPU"):
    def side(times, peak, versions):
        replies = [{"seconds": s, "work": 64, "steps": 64} for s in times]
        return {
            "repetitions": replies,
            "peak_rss_bytes": peak,
            "warmup_s": 1.0,
            "versions": versions,
        }

    return {
        "mode": mode,
        "quick": quick,
        "started": "2026-01-01T00:00:00+00:00",
        "threads": 2,
        "cpu": cpu,
        "allocator": "",
        "git": {"commit": "a" * 40, "dirty": False},
        "cores_elsewhere": 0.25,
        "limits": {"matmul_gflop_s": 100.0, "read_gb_s": 20.0, "copy_gb_s": 10.0},
        "ours": side(ours, 1_500_000_000, {"jax": "1"}),
        "theirs": side(theirs, 2_000_000_000, {"torch": "2"}),
    }


def test_summary_by_hand():
    found = table.summary(row())
    assert found["ours"] == pytest.approx(32)  # 64, 32, 16 tokens/s
    assert found["theirs"] == pytest.approx(64 / 3)
    assert found["ratio"] == pytest.approx(1.5)
    assert found["pairs"] == pytest.approx((1.5, 0.75, 3.0))
    assert found["limit"] == pytest.approx(20 / 0.537919488)
    assert found["of_limit"] == pytest.approx(32 * 0.537919488 / 20)


def test_the_table_shows_the_last_measured_row_of_each_mode(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [
        row("decode8", cpu="new"),
        row("decode1", ours=(9.0,), theirs=(9.0,)),
        row("decode1"),
        row("decode1", quick=True, ours=(9.0,), theirs=(9.0,)),
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    bench.main(["--table", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == (
        "| decode, batch 1 | 32.0 | 21.3 | **1.50** | 1.50 (0.75–3.00) | ≥ 1.40 | 37 | 86% "
        "| 1.5 / 2.0 |"
    )
    assert lines[3].startswith("| decode, batch 8 |")
    assert {line.count("|") for line in lines[:4]} == {10}
    assert "CPU; new, 2 threads, float32; 3 repetitions" in lines[5]
    assert lines[6] == "- both sides under GLIBC_TUNABLES unset"
    assert lines[8].endswith("meanwhile: 0.25 to 0.25")
    assert "torch 2" in lines[9]
    assert not any("quick" in line for line in lines)


def test_quick_rows_say_so_and_no_rows_are_an_error(tmp_path):
    assert "not a measurement" in table.render([row(quick=True)])
    with pytest.raises(SystemExit, match=r"none\.jsonl holds no rows"):
        table.read(tmp_path / "none.jsonl")


def test_packed_rows_hold_every_example_once_in_steps_of_one_shape():
    lengths = [300, 200, 100, 512, 412, 7, 5]
    steps = prepare.packed_rows(lengths, {"packed_length": 512, "packed_rows": 2})
    assert {len(step) for step in steps} == {2}
    rows = [row for step in steps for row in step]
    assert sorted(index for row in rows for index in row) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 512 for row in rows)
    # 1536 tokens fit three rows exactly; the fourth is there for the shape alone.
    assert rows[-1] == []


def test_a_step_keeps_tokens_and_losses_of_its_examples():
    lengths, rng = [5, 3, 4], np.random.default_rng(0)
    ids = [rng.integers(1, 9, n).tolist() for n in lengths]
    made = [shift(x, [0] + [1] * (len(x) - 1)) for x in ids]
    work = {
        "examples": [{k: v.tolist() for k, v in e._asdict().items()} for e in made],
        "packed": [[[0, 1], [2]]],
        "sizes": {"packed_length": 8},
    }
    (batch,) = ours.packed_batches(work)
    assert batch["tokens"].tolist() == [ids[0] + ids[1], ids[2] + [0] * 4]
    assert np.count_nonzero(batch["weights"]) == 4 + 2 + 3
    assert batch["weights"].sum() == pytest.approx(1)


def test_the_work_of_others_is_not_our_own(tmp_path):
    """100 ticks a second or what the system says; idle, waiting and guest time do not count."""
    ticks = os.sysconf("SC_CLK_TCK")
    counts = [1000, 20, 300, 10**9, 10**9, 4, 5, 6, 10**9, 10**9]
    path = tmp_path / "stat"
    path.write_text("cpu  " + " ".join(str(n * ticks) for n in counts) + "\ncpu0 1 2 3\n")
    before = sum(os.times()[:4])
    found = bench.busy_elsewhere_s(path)
    assert 1335 - sum(os.times()[:4]) <= found <= 1335 - before
