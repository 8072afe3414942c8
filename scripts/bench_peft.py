"""Step time and compiled memory of every fine-tuning method beside the full step's, on SmolLM2-135M.

    bash scripts/cpu.sh .venv/bin/python -m scripts.bench_peft              all methods, about 5 minutes
    bash scripts/cpu.sh .venv/bin/python -m scripts.bench_peft --methods LoRA DoRA --repeats 15

All steps are compiled first and then take turns, one step each, on the same rows (a soft prompt's
tokens stand before them): a machine that drifts, drifts for all. Times are medians; `of full` is the
median of the ratios of one turn. Memory is the compiler's: arguments and temporaries. Every position
has a loss. Other programs falsify the times: how many cores they kept busy is printed below.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
import numpy as np

from experiments.shared.cells import markdown
from experiments.shared.methods import METHODS, Adapted
from research import hub
from research.data import packing, source, supervised
from research.hub.download import smollm2
from research.objectives import next_token
from research.plan.program import beginning, lowered, memory_of
from research.train.optim import AdamW
from research.types import Batch
from scripts.bench import busy_elsewhere_s

Step = Callable[[], float]


def rows(vocab_size: int, count: int, length: int, before: Sequence[int]) -> Batch:
    """Rows of random tokens, the same whatever stands before them."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        ids = rng.integers(0, vocab_size, length)
        made.append(supervised.prepend(supervised.shift(ids, np.ones(length)), before))
    return source.normalise(packing.pad(made, length + len(before)))


def prepared(adapted: Adapted, batch: Batch) -> tuple[Step, dict[str, int]]:
    """A function that takes one step and says how many seconds it took, warm; the step's memory."""
    objective = adapted.penalised(next_token(adapted.model))
    optimizer = adapted.finished(AdamW(1e-6))
    program = lowered(objective, optimizer, adapted.params, adapted.rule, batch).compile()
    state, frozen = beginning(optimizer, adapted.params, adapted.rule)

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = program(state, frozen, None, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    step()
    return step, memory_of(program)


def measure(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(step())
    return times


def line(name: str, seconds: list[float], full: list[float], memory: dict[str, int]) -> list[str]:
    ratio = median(own / other for own, other in zip(seconds, full, strict=True))
    sizes = (memory["peak_bytes"], memory["temporary_bytes"])
    return [name, f"{median(seconds):.3f}", f"{ratio:.2f}", *(f"{s / 1e6:,.0f}" for s in sizes)]


def compare(model: Any, params: Any, options: argparse.Namespace) -> str:
    """The table, a line a method."""
    steps, memory = {}, {}
    for name in dict.fromkeys(["full", *options.methods]):
        adapted = METHODS[name].apply(model, params, jax.random.key(1), 10 * options.repeats + 100)
        batch = rows(model.config.vocab_size, options.rows, options.length, adapted.before)
        start = time.perf_counter()
        steps[name], memory[name] = prepared(adapted, batch)
        print(f"{name}: compiled and warm after {time.perf_counter() - start:.1f} s", flush=True)
    start, busy = time.perf_counter(), busy_elsewhere_s()
    times = measure(steps, options.repeats)
    elsewhere = (busy_elsewhere_s() - busy) / (time.perf_counter() - start)
    lines = [line(name, times[name], times["full"], memory[name]) for name in steps]
    note = (
        f"\n{options.rows} rows of {options.length}, {options.repeats} steps of each in turns; other "
        f"programs kept {max(0, elsewhere):.2f} cores busy meanwhile.\n"
    )
    return markdown(["method", "s a step", "of full", "peak MB", "of it temporary"], lines) + note


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_peft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trained = [name for name in METHODS if name != "nothing"]
    parser.add_argument("--methods", nargs="+", choices=trained, default=trained, metavar="METHOD")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    loaded = hub.load(smollm2())
    print(compare(loaded.model, loaded.params, options))


if __name__ == "__main__":
    main()
