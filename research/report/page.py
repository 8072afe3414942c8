"""The page: what was run, what it changed, what it says now, what it cost.

Every text from a run (prompts, answers, names, notes) is escaped. The page forbids itself any
connection by its content security policy.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.report import sections
from research.report.text import escape, prose

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render(
    record: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
    before_after: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, str]],
    notes: Sequence[str] = (),
    title: str | None = None,
) -> str:
    """One HTML document.

    record        a result row (research.runs): config, git, versions, device, wall_s, ...
    curves        metric rows {"step": int, name: number, ...}; a step may come in several rows,
                  and the last value of a name at a step counts (a resumed run repeats steps)
    before_after  {"name", "before", "after"} and, where known, "better": "lower" or "higher",
                  "unit", "before_interval" and "after_interval": (low, high)
    samples       {"prompt", "before", "after"}
    notes         paragraphs; `...` is shown as code

    ValueError names the row that lacks something.
    """
    sections.require(before_after, ("name", "before", "after"), "before_after")
    sections.require(samples, ("prompt", "before", "after"), "samples")
    sections.require(curves, ("step",), "curves")
    title = title or str(record["experiment"]).replace("_", " ")
    series = sections.series(curves)
    body = [
        sections.header(title, record),
        sections.tiles(before_after, record),
        sections.section("What changed", sections.comparison(before_after)),
        sections.section("Answers, side by side", sections.answers(samples)),
        sections.section("Training", sections.charts(series)),
        sections.section("Notes", "".join(f"<p>{prose(note)}</p>" for note in notes)),
        sections.section("Cost", sections.facts(sections.cost(record, series))),
        sections.section("Environment", sections.facts(sections.environment(record))),
        sections.section("Config", sections.config(record)),
    ]
    return document(
        title,
        "\n".join(part for part in body if part),
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
    )


def document(title: str, body: str, style: str, script: str) -> str:
    """A whole page around `body`, which is HTML already; it may load nothing."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{script}</script>
</body>
</html>
"""


def write(path: Path | str, *arguments: Any, **named: Any) -> Path:
    """Writes `render(*arguments, **named)` to `path`, whole or not at all, and returns the path."""
    return put(Path(path), render(*arguments, **named))


def put(path: Path, text: str) -> Path:
    """Writes `text` to `path`, whole or not at all, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)  # mkstemp's files are for their owner only
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path
