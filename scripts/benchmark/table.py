"""The Markdown table of benchmark rows: a pure function of what was written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scripts.benchmark.modes import MODES, limit_s

Row = dict[str, Any]
HEADER = (
    "| work, tokens/s | ours | reference | ratio of medians | ratio of pairs: median (min–max) "
    "| wanted | machine's limit | ours of limit | peak GB, ours / reference |"
)


def read(path: Path) -> list[Row]:
    """The last row of every mode in a file of rows; quick ones only where nothing else is.

    SystemExit when there are none.
    """
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    if not rows:
        raise SystemExit(f"{path} holds no rows; measure some: python -m scripts.bench")
    last = {row["mode"]: row for row in sorted(rows, key=lambda row: not row["quick"])}
    return [last[mode] for mode in MODES if mode in last]


def summary(row: Row) -> dict[str, Any]:
    """Speeds in work a second, ratios ours / theirs, the limit, and peak memory in bytes."""
    ours, theirs = speeds(row["ours"]), speeds(row["theirs"])
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    reply = row["ours"]["repetitions"][0]
    limit = reply["work"] / limit_s(MODES[row["mode"]], reply, row["limits"])
    return {
        "ours": median(ours),
        "theirs": median(theirs),
        "ratio": median(ours) / median(theirs),
        "pairs": (median(pairs), min(pairs), max(pairs)),
        "limit": limit,
        "of_limit": median(ours) / limit,
        "peaks": (row["ours"]["peak_rss_bytes"], row["theirs"]["peak_rss_bytes"]),
    }


def speeds(side: dict[str, Any]) -> list[float]:
    return [reply["work"] / reply["seconds"] for reply in side["repetitions"]]


def render(rows: Sequence[Row]) -> str:
    """The table and, below it, what it was measured on."""
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    lines += [line(row) for row in rows]
    return "\n".join([*lines, "", *notes(rows)])


def line(row: Row) -> str:
    mode, found = MODES[row["mode"]], summary(row)
    middle, low, high = found["pairs"]
    cells = [
        mode.title + (f" ({mode.unit})" if mode.unit != "tokens" else ""),
        f"{found['ours']:.1f}",
        f"{found['theirs']:.1f}",
        f"**{found['ratio']:.2f}**",
        f"{middle:.2f} ({low:.2f}–{high:.2f})",
        f"≥ {mode.wanted:.2f}",
        f"{found['limit']:.0f}",
        f"{found['of_limit']:.0%}",
        " / ".join(f"{peak / 1e9:.1f}" for peak in found["peaks"]),
    ]
    return f"| {' | '.join(cells)} |"


def notes(rows: Sequence[Row]) -> list[str]:
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["ours"]["versions"] | row["theirs"]["versions"]
    repeats = sorted({len(row["ours"]["repetitions"]) for row in rows})
    starts = sorted(row["started"] for row in rows)
    commits = sorted({(row["git"]["commit"] or "no commit")[:10] for row in rows})
    dirty = any(row["git"]["dirty"] for row in rows)
    spread = {
        name: [row["limits"][name] for row in rows]
        for name in ("matmul_gflop_s", "read_gb_s", "copy_gb_s")
    }
    low, high = ({k: f(v) for k, v in spread.items()} for f in (min, max))
    elsewhere = [row["cores_elsewhere"] for row in rows]
    result = [
        f"- {'; '.join(sorted({row['cpu'] for row in rows}))}, "
        f"{_set(row['threads'] for row in rows)} threads, float32; "
        f"{_set(repeats)} repetitions of each, {starts[0]} to {starts[-1]}, at "
        f"{', '.join(commits)}{' with uncommitted changes' if dirty else ''}",
        f"- both sides under GLIBC_TUNABLES {_set(row.get('allocator') or 'unset' for row in rows)}",
        f"- limits before each mode: slowest {limits_line(low)}; fastest {limits_line(high)}",
        f"- cores that other programs kept busy meanwhile: {min(elsewhere):.2f} to "
        f"{max(elsewhere):.2f}",
        f"- {', '.join(f'{name} {number}' for name, number in versions.items())}",
    ]
    if any(row["quick"] for row in rows):
        result.append("- **quick rows: small shapes, once each; not a measurement**")
    return result


def limits_line(limits: dict[str, float]) -> str:
    return (
        f"matrix product {limits['matmul_gflop_s']:.0f} GFLOP/s, reading "
        f"{limits['read_gb_s']:.1f} GB/s, copying {limits['copy_gb_s']:.1f} GB/s"
    )


def _set(values: Any) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))
