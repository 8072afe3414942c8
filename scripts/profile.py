"""Where the time of a step goes: a few steps under JAX's profiler, and the operations that took it.

    python -m scripts.profile --work train --model tiny
    python -m scripts.profile --work train --model smollm2-135m --method lora --rows 4 --length 256
    python -m scripts.profile --work decode --model smollm2-135m --rows 1
    python -m scripts.profile --work prefill --model smollm2-135m --length 512

Any preset of research/models/families can be named, with parameters freshly drawn: speed does not depend
on them, and nothing is fetched. The trace stays under --out; https://ui.perfetto.dev opens its
trace.json.gz, XProf its xplane.pb.

Self time is an operation's own, without those that it calls (a loop's body), added up over threads. An
operation's place in the model is known for training alone, whose program is at hand.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.shared.cells import markdown
from research.compiled import keep_compiled
from research.decode import Sampling, generate
from research.decode.generate import for_decoding
from research.models.decoder import Decoder, DecoderConfig, init
from research.models.families import PRESETS
from research.models.families.llama import llama
from research.plan.devices import named
from research.plan.work import METHODS, Work
from research.runs.environment import ROOT
from scripts.planning.running import running

Event = Mapping[str, Any]
MODELS = {"tiny": llama(256, 2, 64, 4, 2, 128, max_length=1024), **PRESETS}
NEW_TOKENS = 16
# The most events that the profiler writes as JSON; it leaves out the rest.
MOST_EVENTS = 1_000_000


@dataclass(frozen=True)
class Job:
    """What is profiled: `step()` returns when its result is there; `unit` says what a step is.
    `places` are where operations come from, by name."""

    step: Callable[[], Any]
    unit: str
    places: Mapping[str, str]


@dataclass(frozen=True)
class Operation:
    """All calls of one operation; `self_us` is without the operations inside it."""

    name: str
    calls: int
    self_us: float


def training(config: DecoderConfig, options: argparse.Namespace) -> Job:
    method = named(options.method, METHODS, "method")
    run = running(Work(config, method, options.rows, options.length))
    unit = f"a {options.method} step of {options.rows} rows of {options.length} tokens"
    return Job(run.step, unit, places(run.program.as_text()))


def generation(config: DecoderConfig, options: argparse.Namespace, new: int) -> Job:
    """Greedy: a prompt of `length` tokens a row is read, and `new` tokens are said."""
    model = Decoder(config)
    params = for_decoding(jax.jit(partial(init, model))(jax.random.key(0)), donate=True)
    shape = (options.rows, options.length)
    prompts = np.random.default_rng(0).integers(3, config.vocab_size, shape).tolist()
    sampling = Sampling(temperature=0.0, max_tokens=new)
    unit = f"reading {shape[0]} × {shape[1]} tokens and saying {new}"
    return Job(lambda: generate(model, params, prompts, jax.random.key(0), sampling), unit, {})


WORK = {
    "train": training,
    "decode": partial(generation, new=NEW_TOKENS),
    "prefill": partial(generation, new=1),
}


def traced(step: Callable[[], Any], steps: int, out: Path) -> float:
    """Writes a trace of so many steps under `out`; -> median seconds of one. The first does not count."""
    step()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would be most of the events
    spent = []
    with jax.profiler.trace(str(out), profiler_options=options):
        for number in range(steps):
            with jax.profiler.StepTraceAnnotation("step", step_num=number):
                start = time.perf_counter()
                step()
                spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def newest(out: Path) -> Path:
    """The trace.json.gz that was written last; FileNotFoundError when there is none."""
    found = sorted(out.glob("plugins/profile/*/*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"the profiler left no trace.json.gz under {out}")
    return found[-1]


def read(path: Path) -> list[Event]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def operations(events: Iterable[Event]) -> list[Operation]:
    """Compiled operations by self time, the longest first.

    They are on threads of devices where there are any, else on those of XLA's CPU client. What its
    runtime says of itself (`ThunkExecutor::Execute`) is waiting or calling, and left out.
    """
    events = list(events)
    threads = computing(events)
    calls: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    lanes = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in threads:
            lanes[event["pid"], event["tid"]].append(event)
    for lane in lanes.values():
        for event, own in self_times(lane):
            if "::" not in event["name"]:
                calls[event["name"]] += 1
                total[event["name"]] += own
    found = [Operation(name, calls[name], total[name]) for name in total]
    return sorted(found, key=lambda operation: -operation.self_us)


def computing(events: Iterable[Event]) -> set[tuple[int, int]]:
    """(process, thread) of those that run compiled operations."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    streams = {
        k for k, n in threads.items() if "/device:" in processes.get(k[0], "") and "Str" in n
    }
    return streams or {key for key, name in threads.items() if name.startswith("tf_XLA")}


def self_times(lane: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each event of one thread with its microseconds less those of the events right inside it."""
    found: list[list] = []
    open_: list[list] = []
    for event in sorted(lane, key=lambda e: (e["ts"], -e["dur"])):
        while open_ and event["ts"] >= open_[-1][0]["ts"] + open_[-1][0]["dur"]:
            open_.pop()
        if open_:
            open_[-1][1] -= event["dur"]
        found.append([event, event["dur"]])
        open_.append(found[-1])
    return [(event, max(0.0, own)) for event, own in found]


# What jit and loops put around a name, and says nothing of the model.
FRAMES = r"jit\((step|run|main)\)|while|body|cond|closed_call|checkpoint|remat|"


def places(program: str) -> dict[str, str]:
    """Where each operation of a program's text comes from: {'dot.4': 'backward Block/ffn/dot_general'}."""
    pattern = r'%([\w.-]+) = .*metadata=\{[^}]*?op_name="([^"]+)"'
    return {name: place(path) for name, path in re.findall(pattern, program)}


def place(path: str) -> str:
    """The last names of 'jit(step)/while/body/transpose(jvp())/Block/...', and the direction."""
    bare = re.sub(r"(?:transpose\()?jvp\(([^()]*)\)+", r"\1", path)
    names = [name for name in bare.split("/") if not re.fullmatch(FRAMES, name)]
    return ("backward " if "transpose(" in path else "") + "/".join(names[-4:])


def summary(found: Sequence[Operation], where: Mapping[str, str], top: int) -> str:
    """A table of the `top` operations and one of their kinds; ValueError when nothing was traced."""
    total = sum(operation.self_us for operation in found)
    if not total:
        raise ValueError("the trace holds no compiled operation")
    kinds: dict[str, Operation] = {}
    for each in found:
        kind = re.sub(r"[.\d]+$", "", each.name)
        before = kinds.get(kind, Operation(kind, 0, 0.0))
        kinds[kind] = replace(
            before, calls=before.calls + each.calls, self_us=before.self_us + each.self_us
        )

    def line(operation: Operation) -> list[str]:
        shares = [f"{operation.self_us / 1e3:.2f}", f"{operation.self_us / total:.1%}"]
        return [operation.name, str(operation.calls), *shares]

    heads = ["operation", "calls", "self ms", "share"]
    lines = [[*line(each), where.get(each.name, "")] for each in found[:top]]
    by_kind = sorted(kinds.values(), key=lambda kind: -kind.self_us)[: max(1, top // 2)]
    whole = markdown([*heads, "place"], lines)
    return f"{whole}\n{markdown(['kind', *heads[1:]], list(map(line, by_kind)))}"


def profile(options: argparse.Namespace) -> str:
    """Runs and traces what was asked for; -> what to print."""
    job = WORK[options.work](named(options.model, MODELS, "model"), options)
    seconds = traced(job.step, options.steps, options.out)
    path = newest(options.out)
    events = read(path)
    cut = (
        "\nThe trace was cut: take fewer or shorter steps.\n" if len(events) >= MOST_EVENTS else ""
    )
    head = f"{options.model}: {job.unit}, {seconds:.4g} s (median of {options.steps}, traced)"
    return f"{head}\n\n{summary(operations(events), job.places, options.top)}{cut}\ntrace: {path.parent}"


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--work", choices=WORK, default="train")
    add("--model", default="tiny", help="'tiny' or a preset of research/models/families")
    add("--method", default="full", help=f"of training: {', '.join(METHODS)}")
    add("--rows", type=int, default=2)
    add("--length", type=int, default=64, help="tokens of a row, or of a prompt")
    add("--steps", type=int, default=3, help="that are traced")
    add("--top", type=int, default=15, help="operations that are shown")
    add("--out", type=Path, default=ROOT / "runs" / "profile")
    options = parser.parse_args(arguments)
    if min(options.rows, options.length, options.steps, options.top) < 1:
        parser.error("every number must be at least 1")
    return parser, options


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = parse(arguments)
    keep_compiled()
    try:
        print(profile(options))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
