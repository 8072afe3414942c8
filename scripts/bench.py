"""Our speed next to transformers + peft: same weights, shapes, dtype and threads, alternating.

    python -m scripts.bench                              all modes, 5 repetitions each; a table
    python -m scripts.bench --modes decode1 decode8 --repeats 9
    python -m scripts.bench --quick                      small shapes, once each: does it all run?
    python -m scripts.bench --table experiments/results/bench.jsonl       the table of kept rows
    python -m scripts.bench attention ...        kernels on this device (scripts/benchmark/attention.py)
    python -m scripts.bench train ...            a training step on it  (scripts/benchmark/train.py)

For each mode two long-lived workers load, compile and warm up, must agree on a result, and then
take turns, one repetition each, never both at once: a machine that drifts, drifts for both. Needs
the reference libraries (`bash scripts/references.sh`). Rows go to runs/bench.jsonl unless
`--output` names another file; docs/PERFORMANCE.md says what is timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from research.runs import environment
from scripts.benchmark import table
from scripts.benchmark.modes import MODES

Row = dict[str, Any]
ROOT = environment.ROOT
REFERENCE = ROOT / ".references" / "venv" / "bin" / "python"
OUTPUT = ROOT / "runs" / "bench.jsonl"
TOLERANCE = 1e-3


class WorkerError(RuntimeError):
    """A worker ended before it answered, or the two do not compute the same thing."""


class Worker:
    """A process that speaks the protocol of `benchmark.worker`. Its stderr is ours."""

    def __init__(self, name: str, command: Sequence[str], environ: dict[str, str] | None = None):
        self.name = name
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            list(command), cwd=ROOT, env=environ, stdin=pipe, stdout=pipe, text=True
        )
        self.ready = self.receive()

    def receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise WorkerError(f"worker {self.name} ended with status {status}; see its words above")
        return json.loads(line)

    def repeat(self) -> dict[str, Any]:
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which `receive` finds and says
        return self.receive()

    def finish(self) -> dict[str, Any]:
        """Its last words; it has ended then."""
        self.process.stdin.close()
        last = self.receive()
        self.process.wait()
        return last

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def compare(
    ours: Sequence[str],
    theirs: Sequence[str],
    repeats: int,
    tell: Callable[[str], None] = print,
    environ: dict[str, str] | None = None,
) -> dict[str, Any]:
    """{"check", "ours", "theirs"} of two worker commands, repetitions alternating.

    WorkerError when a worker fails or their checks differ.
    """
    workers: list[Worker] = []
    try:
        for name, command in (("ours", ours), ("theirs", theirs)):
            workers.append(Worker(name, command, environ))
            tell(f"  {name} warm after {workers[-1].ready['warmup_s']:.1f} s")
        check = agree(*(worker.ready["check"] for worker in workers))
        tell(f"  both agree: {shown(check)}")
        replies: dict[str, list] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for worker in workers:
                reply = worker.repeat()
                replies[worker.name].append(reply)
                tell(f"  {worker.name:6} {reply['work'] / reply['seconds']:9.1f} /s")
        return {"check": check} | {w.name: record(w, replies[w.name]) for w in workers}
    finally:
        for worker in workers:
            worker.stop()


def record(worker: Worker, replies: list[dict[str, Any]]) -> dict[str, Any]:
    ready = {name: worker.ready[name] for name in ("warmup_s", "versions")}
    return {**ready, "repetitions": replies, **worker.finish()}


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Both results, {name: [ours, theirs]}; WorkerError where numbers differ by more than 1e-3 or
    anything else at all."""
    both = {name: [ours.get(name), theirs.get(name)] for name in ours | theirs}
    for name, (a, b) in both.items():
        close = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= TOLERANCE
        if not (close or a == b):
            raise WorkerError(f"ours and theirs differ in {name!r}: {a} and {b}")
    return both


def shown(check: dict[str, Any]) -> str:
    def one(name: str, a: Any, b: Any) -> str:
        return f"{name} {a:.5f} and {b:.5f}" if isinstance(a, float) else f"{name} equal"

    return ", ".join(one(name, *values) for name, values in check.items())


def measure(mode: str, options: argparse.Namespace, workload: str, environ: dict) -> Row:
    """One row: the machine's limits now, then both sides of one mode."""
    threads = str(options.threads)
    ours = [sys.executable, "-m"]
    limits = [*ours, "scripts.benchmark.limits", threads]
    row = {
        "mode": mode,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "threads": options.threads,
        "cpu": environment.cpu_model(),
        "allocator": environ.get("GLIBC_TUNABLES", ""),
        "git": environment.commit(),
        "limits": json.loads(output_of(limits, environ)),
    }
    print(f"{mode}: {table.limits_line(row['limits'])}", flush=True)
    sides = [
        [*ours, "scripts.benchmark.ours", workload, mode, threads],
        [str(options.reference), "-m", "scripts.benchmark.theirs", workload, mode, threads],
    ]
    tell = lambda line: print(line, flush=True)  # noqa: E731
    start, before = time.perf_counter(), busy_elsewhere_s()
    row |= compare(*sides, options.repeats, tell, environ)
    elsewhere = (busy_elsewhere_s() - before) / (time.perf_counter() - start)
    return row | {"cores_elsewhere": max(0.0, elsewhere)}


def busy_elsewhere_s(path: Path = Path("/proc/stat")) -> float:
    """Processor time since boot, of all cores, less that of this process and its ended children."""
    fields = path.read_text().splitlines()[0].split()[1:]
    # user, nice, system, then idle and waiting, then interrupts and what the host took away.
    busy = sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def output_of(command: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise WorkerError(f"{' '.join(command[1:])} ended with status {done.returncode}")
    return done.stdout.strip()


def confine(threads: int) -> dict[str, str]:
    """Binds this process and its children to so many cores; -> the workers' environment.

    XLA counts the cores it may use, the others count the variables.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            raise SystemExit(f"{threads} threads are asked for, {len(cores)} cores are there")
        os.sched_setaffinity(0, cores[:threads])
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    chosen = {name: str(threads) for name in counts}
    return {**os.environ, **chosen, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}


def run(options: argparse.Namespace) -> list[Row]:
    if not Path(options.reference).exists():
        raise SystemExit(f"there is no {options.reference}; run: bash scripts/references.sh")
    environ = confine(options.threads)
    prepare = [sys.executable, "-m", "scripts.benchmark.prepare"]
    workload = output_of(prepare + ["--quick"] * options.quick, environ)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for mode in options.modes:
        rows.append(measure(mode, options, workload, environ))
        with options.output.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small shapes, one repetition")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="rows are appended here")
    parser.add_argument("--reference", default=REFERENCE, help="Python that has torch and peft")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only show the rows of FILE")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    options.repeats = 1 if options.quick else options.repeats
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] in (["attention"], ["train"]):
        importlib.import_module(f"scripts.benchmark.{given[0]}").main(given[1:])
        return
    options = parse(given)
    if options.table is not None:
        print(table.render(table.read(options.table)))
        return
    try:
        rows = run(options)
    except WorkerError as error:
        raise SystemExit(str(error)) from error
    print(f"\n{table.render(rows)}\n\nrows: {options.output}")


if __name__ == "__main__":
    main()
