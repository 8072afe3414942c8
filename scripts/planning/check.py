"""Plans against steps that are really taken, on this machine: `python -m scripts.plan --check`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.shared.cells import markdown
from research.plan.devices import Device
from research.plan.predict import Plan, predict
from research.plan.work import METHODS, Work
from scripts.bench import busy_elsewhere_s
from scripts.planning.running import (
    SMALL,
    Running,
    calibrated,
    compiled_flops,
    in_turns,
    reference_of,
    running,
    speeds,
)

CASES = {
    f"{name}, {rows}×{length}": Work(SMALL, METHODS[name], rows, length)
    for name, rows, length in (
        ("full", 4, 128),
        ("full", 4, 256),
        ("full-remat", 4, 256),
        ("lora", 4, 128),
        ("lora", 4, 256),
        ("qlora", 4, 256),
    )
}
# The largest part by which a plan may be off.
GOALS = {"held": 0.10, "temporary": 0.10, "flops": 0.10, "seconds": 0.35}
HEADS = {"held": "held MB", "temporary": "temporary MB", "flops": "GFLOP", "seconds": "ms"}
UNITS = {"held": 1e6, "temporary": 1e6, "flops": 1e9, "seconds": 1e-3}


@dataclass(frozen=True)
class Row:
    """(planned, measured) of each quantity."""

    name: str
    pairs: Mapping[str, tuple[float, float]]

    def ratio(self, what: str) -> float:
        planned, measured = self.pairs[what]
        return planned / measured

    @property
    def missed(self) -> list[str]:
        """Quantities that are further off than GOALS."""
        return [what for what, most in GOALS.items() if abs(self.ratio(what) - 1) > most]


def planned(plan: Plan) -> dict[str, float]:
    memory = plan.memory
    temporary = float(memory.gradients + memory.temporaries)
    return {
        "held": float(memory.kept),
        "temporary": temporary,
        "flops": plan.cost.flops,
        "seconds": plan.seconds,
    }


@dataclass(frozen=True)
class Checked:
    """What the machine was measured at, how many of its cores other programs kept busy while the steps
    were taken, and a row for each case."""

    machine: Device
    cores_elsewhere: float
    rows: list[Row]


def check(cases: Mapping[str, Work] = CASES, rounds: int = 15) -> Checked:
    """Plans of `cases` and what they really take.

    All steps take turns with those that calibrate, a shallow one for each method, so that a machine
    whose speed drifts drifts for all.
    """
    methods = list(dict.fromkeys(work.method for work in cases.values()))
    works = [*map(reference_of, methods), *cases.values()]
    real = [running(work) for work in works]
    start, before = time.perf_counter(), busy_elsewhere_s()
    spent = in_turns([each.step for each in real], rounds)
    elsewhere = (busy_elsewhere_s() - before) / (time.perf_counter() - start)
    machine = speeds()
    cpus = {m: calibrated(machine, m, s) for m, s in zip(methods, spent, strict=False)}
    rows = []
    for name, run, seconds in zip(cases, real[len(methods) :], spent[len(methods) :], strict=True):
        ours = planned(predict(run.work, 1, cpus[run.work.method]))
        found = measured(run, seconds)
        rows.append(Row(name, {what: (ours[what], found[what]) for what in GOALS}))
    return Checked(machine, elsewhere, rows)


def measured(run: Running, seconds: float) -> dict[str, float]:
    return {
        "held": float(run.held_bytes),
        "temporary": float(run.temporary_bytes),
        "flops": compiled_flops(run.work),
        "seconds": seconds,
    }


def table(rows: Sequence[Row]) -> str:
    """Planned / measured and their ratio, and what missed its goal."""

    def cell(row: Row, what: str) -> str:
        planned, measured = (value / UNITS[what] for value in row.pairs[what])
        return f"{planned:,.1f} / {measured:,.1f} ({row.ratio(what):.2f})"

    lines = [[row.name, *(cell(row, what) for what in GOALS)] for row in rows]
    heads = ["step", *(HEADS[what] for what in GOALS)]
    missed = [f"{row.name}: {what}" for row in rows for what in row.missed]
    goals = ", ".join(f"{what} {most:.0%}" for what, most in GOALS.items())
    verdict = f"missed: {'; '.join(missed)}" if missed else "all within the goals"
    return f"{markdown(heads, lines)}\n\ngoals: {goals}. {verdict}"
