import dataclasses
import hashlib
import json

import pytest

from research.models.layers import RMSNorm
from research.runs import Places, command, main, param, product, results
from research.runs.canonical import run_id


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    optim: Optim = Optim()
    steps: int = 100
    seed: int = 0


BASE = Config()
SWEEP = product(param("optim.lr", 0.1, 0.2), param("seed", 0, 1))
CALLS = []


def run(config, directory):
    """Notes that it ran; 'fails' after its first half until a file says that half is done."""
    CALLS.append((config, (directory / "half").exists()))
    if config.seed == 13 and not (directory / "half").exists():
        (directory / "half").touch()
        raise KeyboardInterrupt
    return {"loss": config.optim.lr * config.steps, "eval": {"nll": float("nan")}}


@pytest.fixture
def start(tmp_path):
    CALLS.clear()

    def start(*arguments, **more):
        options = {"smoke": {"steps": 2}, **more}
        return main(BASE, SWEEP, run, arguments=arguments, root=tmp_path, **options)

    start.results = tmp_path / "experiments/results/test_command.jsonl"
    start.root = tmp_path
    return start


def test_a_row_holds_what_is_needed_to_repeat_and_to_judge_the_run(start):
    (row,) = start("--set", "optim.lr=0.5")
    assert results.read(start.results) == [json.loads(json.dumps(row))]
    assert row["experiment"] == "test_command"
    assert row["id"].startswith("test_command-")
    assert row["overrides"] == {"optim.lr": 0.5}
    assert row["config"]["optim"] == {"type": f"{__name__}:Optim", "lr": 0.5}
    assert row["metrics"] == {"loss": 50.0, "eval": {"nll": "nan"}}
    assert row["seed"] == 0
    assert row["wall_s"] >= 0
    assert row["peak_rss_bytes"] > 10_000_000
    assert {"commit", "dirty"} == row["git"].keys()
    assert {"versions", "device", "lock_sha256", "started", "attempts"} <= row.keys()
    config = json.loads((start.root / "runs" / row["id"] / "config.json").read_text())
    assert config == row["config"]


def test_a_sweep_skips_the_rows_that_are_there(start, capsys):
    start("--set", "optim.lr=0.2")
    rows = start("--sweep")
    assert len(rows) == 4
    assert len(CALLS) == 4  # one before the sweep and three of it
    assert len({row["id"] for row in results.read(start.results)}) == 4
    assert "done already" in capsys.readouterr().out
    start("--sweep")
    assert len(CALLS) == 4


def test_force_runs_again_from_an_empty_directory_and_the_latest_row_counts(start):
    (first,) = start()
    (start.root / "runs" / first["id"] / "half").touch()
    start("--force")
    assert [had_half for _, had_half in CALLS] == [False, False]
    rows = results.read(start.results)
    assert len(rows) == 2
    assert len(results.latest(rows)) == 1


def test_a_run_that_was_cut_off_gets_its_directory_again(start, capsys):
    with pytest.raises(KeyboardInterrupt):
        start("--set", "seed=13")
    assert not start.results.exists()
    (row,) = start("--set", "seed=13")
    assert [had_half for _, had_half in CALLS] == [False, True]
    assert row["attempts"] == 2
    assert "attempt 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "smoke", [{"steps": 2}, lambda config: dataclasses.replace(config, steps=2)]
)
def test_smoke_is_small_starts_afresh_and_stays_out_of_the_results(start, smoke):
    for _ in range(2):
        start("--smoke", "--sweep", smoke=smoke)
    assert {config.steps for config, _ in CALLS} == {2}
    assert len(CALLS) == 8
    assert not start.results.exists()
    assert len(results.read(start.root / "runs/smoke/test_command.jsonl")) == 8


def test_smoke_that_makes_runs_equal_runs_one_of_them(start):
    assert len(start("--smoke", "--sweep", smoke={"optim.lr": 1.0, "seed": 0})) == 1


def test_list_runs_nothing(start, capsys):
    start()
    capsys.readouterr()
    start("--sweep", "--list")
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["done", "to", "to", "to"]
    assert "optim.lr=0.2 seed=1" in out[-1]
    assert len(CALLS) == 1


@dataclasses.dataclass(frozen=True)
class Decode:
    beams: int
    temperature: float = 1.0
    optim: Optim = Optim()
    stop: tuple[int, ...] = ()
    extra: dict = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Optim(), "Optim"),
        (Optim(lr=0.2), "Optim(lr=0.2)"),
        (Decode(1), "Decode(beams=1)"),
        (Decode(4, temperature=1, stop=(1, 2)), "Decode(beams=4, stop=1,2)"),
        (Decode(1, 0.5, Optim(3.0)), "Decode(beams=1, temperature=0.5, optim=Optim(lr=3.0))"),
        (Decode(1, extra={"a": 1}), "Decode(beams=1, extra={'a': 1})"),
        (RMSNorm(1e-3), "RMSNorm(eps=0.001)"),
        (run, "run"),
        (Optim, "Optim"),
        ((1, 2), "1,2"),
        (None, "None"),
    ],
)
def test_a_label_shows_what_is_not_default(value, shown):
    assert command.label(value) == shown


def test_labels_tell_the_runs_of_a_sweep_apart_and_leave_ids_alone(tmp_path, capsys):
    base, sweep = Config(), param("optim", Optim(), Optim(lr=0.5))
    main(base, sweep, run, smoke={}, arguments=["--sweep", "--list"], root=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["optim=Optim", "optim=Optim(lr=0.5)"]
    ids = [run_id("test_command", Config(optim=optim)) for optim in (Optim(), Optim(lr=0.5))]
    assert [line.split()[-2] for line in lines] == ids
    # The id is a digest of the canonical JSON, written out here.
    text = (
        f'{{"optim":{{"lr":0.5,"type":"{__name__}:Optim"}},"seed":0,"steps":100,'
        f'"type":"{__name__}:Config"}}'
    )
    assert ids[1] == f"test_command-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def test_the_table_is_printed_over_all_rows(start, capsys):
    start("--sweep")
    start("--set", "seed=5", table=lambda rows: f"{len(rows)} rows in the table")
    assert "5 rows in the table" in capsys.readouterr().out


def test_a_run_outside_the_sweep_makes_no_table(start, capsys):
    start("--set", "steps=7", table=lambda rows: pytest.fail("a table without what it is about"))
    assert "no table: none of the rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--sweep", "--set", "optim.lr=1"], "--set optim.lr: the sweep varies this field"),
        (["--set", "optim.learning=1"], "no field 'optim.learning'; closest: optim.lr"),
        (["--set", "steps=many"], "steps: expected int, got 'many'"),
        (["--set", "steps"], "--set 'steps': expected FIELD=VALUE"),
    ],
)
def test_a_bad_override_is_said_in_a_line_and_nothing_runs(start, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        start(*arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not CALLS


def test_a_base_without_a_seed_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a dataclass with an int `seed`"):
        main(Optim(), [], run, smoke={}, arguments=[], root=tmp_path)


def test_a_run_leaves_a_page(start):
    (row,) = start("--set", "optim.lr=0.5")
    text = (start.root / "runs" / row["id"] / "report.html").read_text()
    assert row["id"] in text and "0.5" in text


def test_places_can_be_elsewhere(start, tmp_path):
    places = Places(tmp_path / "mine.jsonl", tmp_path / "mine")
    (row,) = start(places=places)
    assert [each["id"] for each in results.read(tmp_path / "mine.jsonl")] == [row["id"]]
    assert (tmp_path / "mine" / row["id"] / "config.json").exists()
    assert not start.results.exists()
