"""The command line of an experiment: `python -m experiments.NAME`.

    --set field=value ...   strict overrides        --list    the runs and which are done
    --sweep                 every run of SWEEP      --force   run again, from the start
    --smoke                 the tiny config SMOKE; its rows and files stay under runs/smoke/

A finished run is a row of experiments/results/NAME.jsonl and is not run again. An unfinished one
is handed the directory runs/<id>/ that it had before, and goes on from what it saved there. What
was compiled is kept for the next process (`research.compiled`).
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from research.compiled import keep_compiled
from research.kernels import select
from research.runs import environment, page, results
from research.runs.canonical import module_name, run_id, to_json
from research.runs.overrides import OverrideError, lookup, override, parse_assignments

# (config, directory) -> metrics. Whatever the run saves and resumes from goes under `directory`.
Run = Callable[[Any, Path], dict[str, Any]]
Smoke = Mapping[str, Any] | Callable[[Any], Any]


@dataclass(frozen=True)
class Planned:
    """One run to be done: its config, and the overrides that made it from the base."""

    id: str
    config: Any
    overrides: dict[str, Any]

    def __str__(self) -> str:
        shown = " ".join(f"{name}={label(value)}" for name, value in self.overrides.items())
        return f"{self.id}  {shown or '(base)'}"


def label(value: Any) -> str:
    """A config value, short; of a dataclass the fields that differ from their defaults besides."""
    if not is_dataclass(value) or isinstance(value, type):
        return results.brief(to_json(value))
    hidden = ("parent", "name") if isinstance(value, nn.Module) else ()
    found = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in hidden}
    defaults = {f.name: f.default for f in fields(value)}
    defaults |= {f.name: f.default_factory() for f in fields(value) if callable(f.default_factory)}
    told = {name: each for name, each in found.items() if to_json(each) != _json(defaults[name])}
    inside = ", ".join(f"{name}={label(each)}" for name, each in told.items())
    return results.brief(to_json(value)) + (f"({inside})" if inside else "")


def _json(default: Any) -> Any:
    """None of a config's values is MISSING, and it has no JSON form."""
    return MISSING if default is MISSING else to_json(default)


@dataclass(frozen=True)
class Places:
    """Where rows and run directories go."""

    results: Path
    runs: Path


def main(
    base: Any,
    sweep: Sequence[Mapping[str, Any]],
    run: Run,
    table: Callable[[list[results.Row]], str] | None = None,
    *,
    smoke: Smoke,
    arguments: Sequence[str] | None = None,
    root: Path = environment.ROOT,
    places: Places | None = None,
) -> list[results.Row]:
    """Runs what the command line asks for and returns its rows, old and new.

    `base` is a frozen dataclass with an int `seed`; `smoke` is a dict of overrides, or a function
    from config to config, that makes any run small. `table(rows)` is printed at the end. `places`
    overrules where rows and run directories go, below `root` otherwise; those of --smoke stay under
    runs/smoke/.
    """
    experiment = experiment_name(run)
    keep_compiled()
    parser = _parser(experiment, run)
    options = parser.parse_args(arguments)
    try:
        planned = plan(experiment, base, sweep, options, smoke)
    except OverrideError as error:
        parser.error(str(error))
    if places is None or options.smoke:
        places = _places(experiment, root, options.smoke)
    done = {row["id"]: row for row in results.latest(results.read(places.results))}
    if options.list:
        for each in planned:
            print(f"{'done' if each.id in done else 'to do':6} {each}")
        return [done[each.id] for each in planned if each.id in done]
    rows = _run_all(planned, done, run, places, options, experiment)
    if table is not None and not options.smoke:
        print(_table(table, base, sweep, results.latest(results.read(places.results))))
    return rows


def _table(
    table: Callable[[list[results.Row]], str],
    base: Any,
    sweep: Sequence[Mapping[str, Any]],
    rows: list[results.Row],
) -> str:
    """A table is about the sweep: without a row of it, whatever the seed, there is none."""

    def key(config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name != "seed"}

    known = [key(to_json(override(base, point))) for point in ({}, *sweep)]
    if any(key(row["config"]) in known for row in rows):
        return table(rows)
    return "no table: none of the rows has the base config or one of the sweep's"


def experiment_name(run: Run) -> str:
    """'lora_rank' for the `run` of experiments/lora_rank.py."""
    name = module_name(run)
    if name == "__main__":
        raise SystemExit("run an experiment as a module: python -m experiments.NAME")
    return name.rsplit(".", 1)[-1]


def _parser(experiment: str, run: Run) -> argparse.ArgumentParser:
    module = inspect.getmodule(run)
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment}",
        description=(module.__doc__ if module else None) or experiment,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--smoke", action="store_true", help="tiny and quick, rows in runs/smoke/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--sweep", action="store_true", help="every run of the sweep")
    parser.add_argument("--force", action="store_true", help="run again, deleting runs/<id>/")
    parser.add_argument("--list", action="store_true", help="show the runs, run nothing")
    return parser


def plan(
    experiment: str,
    base: Any,
    sweep: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
    smoke: Smoke,
) -> list[Planned]:
    """The runs asked for: sweep's overrides, then the smoke ones, then those of --set."""
    if not is_dataclass(base) or not isinstance(getattr(base, "seed", None), int):
        raise TypeError(f"{experiment}: the base config must be a dataclass with an int `seed`")
    asked = parse_assignments(options.set)
    if options.sweep and not sweep:
        raise OverrideError("--sweep: there is no sweep here")
    planned: dict[str, Planned] = {}
    for point in sweep if options.sweep else [{}]:
        clash = sorted(point.keys() & asked.keys())
        if clash:
            raise OverrideError(f"--set {clash[0]}: the sweep varies this field; leave one of them")
        config = override(base, point)
        if options.smoke:
            config = smoke(config) if callable(smoke) else override(config, smoke)
        config = override(config, asked)
        given = {**point, **{name: lookup(config, name) for name in asked}}
        # Smoke may make two runs of a sweep equal: one of them is enough.
        each = Planned(run_id(experiment, config), config, given)
        planned.setdefault(each.id, each)
    return list(planned.values())


def _places(experiment: str, root: Path, smoke: bool) -> Places:
    if smoke:
        return Places(root / "runs/smoke" / f"{experiment}.jsonl", root / "runs/smoke")
    return Places(root / "experiments/results" / f"{experiment}.jsonl", root / "runs")


def _run_all(
    planned: list[Planned],
    done: dict[str, results.Row],
    run: Run,
    places: Places,
    options: argparse.Namespace,
    experiment: str,
) -> list[results.Row]:
    # The code is loaded by now: what the tree becomes during a long sweep is not what runs.
    git = environment.commit()
    rows = []
    for number, each in enumerate(planned, start=1):
        print(f"[{number}/{len(planned)}] {each}", flush=True)
        if each.id in done and not (options.force or options.smoke):
            print(f"  done already, a row of {places.results}; --force runs it again")
            rows.append(done[each.id])
            continue
        fresh = options.force or options.smoke
        rows.append(_run_one(each, run, places, git, experiment, fresh))
    return rows


def _run_one(
    each: Planned, run: Run, places: Places, git: dict[str, Any], experiment: str, fresh: bool
) -> results.Row:
    directory = places.runs / each.id
    attempt = _enter(directory, each, git, fresh)
    print(f"  directory {directory}" + (f", attempt {attempt}" if attempt > 1 else ""), flush=True)
    # Before the run: nothing here may fail after hours of it.
    facts = {
        "attempts": attempt,
        "started": _now(),
        "git": git,
        "lock_sha256": environment.lock_sha256(),
        "versions": environment.versions(),
        "device": environment.device(),
        "config": to_json(each.config),
    }
    environment.reset_peak_memory()
    clock = time.perf_counter()
    found = run(each.config, directory)
    row = {
        "id": each.id,
        "experiment": experiment,
        "overrides": to_json(each.overrides, "overrides"),
        "seed": each.config.seed,
        "metrics": to_json(found, "metrics"),
        "wall_s": round(time.perf_counter() - clock, 3),
        "peak_rss_bytes": environment.peak_memory(),
        "attention": select.picked(),
        **facts,
    }
    if jax.process_index() == 0:
        results.append(places.results, row)
        page.write(row, directory)
    minutes = f"{row['wall_s'] / 60:.1f} min"
    print(f"  {minutes}, row in {places.results}, page {directory / page.NAME}\n  {_brief(row)}")
    return row


def _enter(directory: Path, each: Planned, git: dict[str, Any], fresh: bool) -> int:
    """Makes the run's directory, notes that an attempt begins, and returns its number from 1."""
    if jax.process_index() != 0:
        return 1
    if fresh and directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_json(each.config), indent=1) + "\n")
    notes = directory / "attempts.jsonl"
    with open(notes, "a") as file:
        file.write(json.dumps({"started": _now(), "git": git}) + "\n")
    return len(notes.read_text().splitlines())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _brief(row: results.Row) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in results.metrics(row).items())
