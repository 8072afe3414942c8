"""Compiles attention kernels and training steps for GPUs that are not here, and reads what came out.

    bash scripts/aot.sh [--devices h100 a100] [--parts kernels step mesh] [--output FILE]

kernels   each Pallas kernel by head size, plain and with every feature: registers, spilled bytes, shared
          memory, tensor core instructions. AssertionError where a default tile of 16-bit inputs spills,
          takes more shared memory than the device has, or misses the tensor cores.
step      a training step (12 layers, width 768, 8 rows of T) by kernel: the compiler's peak memory, and
          that it grows with T and not with T².
mesh      FSDP and tensor-parallel steps for 8 devices: which collectives, and no others.

No times: nothing runs. Rows go to FILE as JSON, tables to the terminal.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.shared.cells import markdown
from scripts.ahead import kernels, steps
from scripts.ahead.target import TARGETS

PARTS = {
    "kernels": (lambda name: kernels.kernel_rows(name, (64, 128, 256)), kernels.check_kernels),
    "step": (lambda name: steps.step_rows(name, (1024, 2048, 4096)), steps.check_steps),
    "mesh": (steps.mesh_rows, steps.check_meshes),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: registers / spilled bytes / shared kB by kernel and device; GB of steps."""
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["part"] == "kernels":
            key = row["case"], row["kernel"], str(row["head"])
            shared = row["shared_bytes"] / 1000
            text = f"{row['registers']} / {row['spilled_bytes']} / {shared:.0f}"
        elif row["part"] == "step":
            key = "step", row["kind"], str(row["length"])
            text = f"{row['peak_bytes'] / 2**30:.1f} GiB"
        else:
            key = "mesh", row["split"], "8 devices"
            text = ", ".join(f"{n} {name}" for name, n in sorted(row["collectives"].items()))
        cells.setdefault(key, {})[row["device"].removeprefix("8x")] = text
    names = sorted({name for found in cells.values() for name in found})
    lines = [[*key, *(found.get(name, "") for name in names)] for key, found in cells.items()]
    return markdown(["case", "kernel", "head or length", *names], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--table", type=Path, metavar="FILE", help="only show the rows of FILE")
    parser.add_argument("--output", type=Path, help="JSON lines, written anew")
    options = parser.parse_args(arguments)
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    rows = []
    for part in options.parts:
        make, check = PARTS[part]
        for name in options.devices:
            mine = []
            for row in make(name):
                print(json.dumps(row), flush=True)
                mine.append(row)
            rows += [{"part": part, **row} for row in mine]
            if options.output:
                options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
            check(mine)


if __name__ == "__main__":
    main()
