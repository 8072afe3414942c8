"""The worker's side of the benchmark: warm up once, then one repetition for each line that arrives.

One JSON object a line on stdout: first what the warm-up found, then a reply for each line of
stdin, and when stdin ends the peak memory. Nothing here needs a library, so that both
interpreters run it.

    ready   {"warmup_s", "check": {...}, "versions": {...}}
    reply   {"seconds", "work", "steps", "tokens", "supervised", ...}
    last    {"peak_rss_bytes"}

`check` holds values that both workers must agree on: numbers to 1e-3, lists of tokens exactly.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Repeat = Callable[[], dict[str, Any]]
Prepare = Callable[[], tuple[dict[str, Any], Repeat]]  # () -> (check, repeat)


def serve(prepare: Prepare, libraries: tuple[str, ...]) -> None:
    """Answer the driver until it closes stdin. Whatever else prints goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def say(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=out, flush=True)

        start = time.perf_counter()
        check, repeat = prepare()
        versions = {name: version(name) for name in libraries}
        say({"warmup_s": time.perf_counter() - start, "check": check, "versions": versions})
        for _ in sys.stdin:
            say(repeat())
        say({"peak_rss_bytes": peak_rss_bytes()})


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of a call, which must not return before its result is there."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_rss_bytes() -> int:
    """VmHWM: the largest resident memory this process has had, loading and warm-up included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line: peak memory is measured on Linux only")
