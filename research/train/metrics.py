"""What a run says about itself: a JSON-lines file, and a progress bar or plain lines.

One row is `{"step": 20, "split": "train", "loss": 2.1, ...}`; evaluations have "split": "eval".
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from research.types import Mean

Row = dict[str, Any]


class MetricsLog:
    """Appends rows to a JSON-lines file; every row is flushed."""

    def __init__(self, path: Path, step: int):
        """Open `path` for a run that goes on after `step`: later rows, which the run will write
        again, and a last line that was cut off are removed. ValueError for any other bad line."""
        rows = [row for row in read(path) if row["step"] <= step] if path.exists() else []
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(_line(row) for row in rows))
        partial.replace(path)
        self._file = path.open("a")

    def write(self, row: Row) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line without its end (a killed run) is left out."""
    rows = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON row: {line[:60]!r}") from error
    return rows


class Meter:
    """Adds the metrics of the steps since the last row, and times them."""

    def __init__(self):
        self._started = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._total: dict[str, Mean] = {}
        self._steps = 0
        self._since = time.perf_counter()

    def add(self, metrics: Mapping[str, Mean]) -> None:
        for name, mean in metrics.items():
            self._total[name] = self._total[name] + mean if name in self._total else mean
        self._steps += 1

    def row(self, step: int) -> Row:
        """The means since the last row, tokens per second (those of the input without padding, and
        those with a loss where the objective counts them), and seconds since the start."""
        row: Row = {"step": step, "split": "train"}
        row |= {name: float(mean.value) for name, mean in self._total.items()}
        # Measured after the values are there: dispatch returns before the work is done.
        now = time.perf_counter()
        took = max(now - self._since, 1e-9)
        for name, counted in (("tokens_per_s", "input_tokens"), ("loss_tokens_per_s", "tokens")):
            if counted in self._total:
                row[name] = float(self._total[counted].total) / took
        row |= {"s_per_step": took / max(self._steps, 1), "elapsed_s": now - self._started}
        self._reset()
        return row

    def pause(self, seconds: float) -> None:
        """Take time spent on something else (evaluation) out of the current row."""
        self._since += seconds


class ProgressBar:
    """A bar on a terminal, one line a row elsewhere: loss, tokens/s, time left."""

    def __init__(self, steps: int, start: int):
        self._steps = steps
        self._bar = self._terminal(start) if sys.stdout.isatty() else None

    def _terminal(self, start: int) -> Progress:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        bar = Progress(*columns)
        self._task = bar.add_task("", total=self._steps, completed=start)
        bar.start()
        return bar

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, row: Row) -> None:
        text = describe(row, self._steps)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=text)
        else:
            print(f"step {row['step']}/{self._steps}  {text}", flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(row: Row, steps: int) -> str:
    """'loss 2.1034  8,120 tokens/s  3:20 left'."""
    parts = [f"loss {row['loss']:.4f}"]
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    seconds = round((steps - row["step"]) * row["s_per_step"])
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(
        f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"
    )
    return "  ".join(parts)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
