"""The parts of the page: each takes rows and returns HTML, '' when there is nothing to show."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.report.chart import Point, line_chart
from research.report.text import duration, escape, number, size

Row = Mapping[str, Any]
Series = dict[str, list[Point]]

TITLES = {
    "loss": "Training loss",
    "eval/nll": "Held-out NLL (nats per token)",
    "eval/perplexity": "Held-out perplexity",
    "lr": "Learning rate",
    "learning_rate": "Learning rate",
    "tokens_per_s": "Tokens per second",
    "grad_norm": "Gradient norm",
    "accuracy": "Next-token accuracy in training",
}
# Clocks, counts, and what only someone who debugs looks at: in metrics.jsonl, not on the page.
NOT_CURVES = {
    *("step", "epoch", "wall_s", "elapsed_s", "s_per_step", "tokens"),
    *("param_norm", "update_norm"),
}


def require(rows: Sequence[Row], keys: Sequence[str], what: str) -> None:
    """ValueError naming the first row that lacks one of the keys."""
    for index, row in enumerate(rows):
        missing = [key for key in keys if key not in row]
        if missing:
            raise ValueError(f"{what}[{index}] lacks {missing}; it has {sorted(row)}")


def series(curves: Iterable[Row]) -> Series:
    """{name: [(step, value)] by step} of every numeric key, known names first.

    In a row with "split": "eval" a name gets 'eval/' before it, if it has not.
    """
    found: dict[str, dict[float, float]] = {}
    for row in curves:
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(_in_split(name, row), {})[row["step"]] = value
    order = [name for name in TITLES if name in found]
    order += [name for name in found if name not in TITLES]
    return {name: sorted(found[name].items()) for name in order}


def _in_split(name: str, row: Row) -> str:
    plain = row.get("split") != "eval" or name == "step" or name.startswith("eval/")
    return name if plain else f"eval/{name}"


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def header(title: str, record: Row) -> str:
    git = record["git"]
    commit = (git["commit"] or "no commit")[:10] + (" + changes" if git["dirty"] else "")
    parts = [record["id"], record["started"].replace("T", " ").replace("+00:00", " UTC"), commit]
    line = "".join(f"<span>{escape(part)}</span>" for part in parts)
    return f'<header><p class="eyebrow">Run report</p><h1>{escape(title)}</h1><p class="meta">{line}</p></header>'


def verdict(row: Row) -> str:
    """'good', 'bad' or 'same' by the row's `better`; '' when it does not say."""
    if row.get("better") not in ("lower", "higher"):
        return ""
    if row["after"] == row["before"]:
        return "same"
    return "good" if (row["after"] < row["before"]) == (row["better"] == "lower") else "bad"


def change(row: Row) -> str:
    """'−0.21 (−11 %)'."""
    difference = row["after"] - row["before"]
    sign = "+" if difference > 0 else "−" if difference < 0 else "±"
    share = f" ({sign}{abs(difference / row['before']):.1%})" if row["before"] else ""
    return f"{sign}{number(abs(difference))}{share}"


def tiles(before_after: Sequence[Row], record: Row) -> str:
    """The first three comparisons and the time it took, in large figures."""
    shown = [
        _tile(
            row["name"],
            escape(number(row["after"])) + _unit(row),
            f'from {escape(number(row["before"]))} <b class="{verdict(row)}">{escape(change(row))}</b>',
        )
        for row in before_after[:3]
    ]
    took = escape(duration(record["wall_s"]))
    shown.append(_tile("Time", took, escape("on " + machine(record["device"]))))
    return f'<div class="tiles">{"".join(shown)}</div>'


def _tile(label: str, value: str, below: str) -> str:
    return (
        f'<div class="tile"><div class="label">{escape(label)}</div>'
        f'<div class="value">{value}</div><div class="below">{below}</div></div>'
    )


def machine(device: Row) -> str:
    """'2 cores of Intel ...' or '8 × NVIDIA H100'."""
    if device["platform"] == "cpu":
        return f"{device['cores']} cores of {device['cpu']}"
    return f"{device['count']} × {device['kind']}"


def _unit(row: Row) -> str:
    return f" <small>{escape(row['unit'])}</small>" if row.get("unit") else ""


def comparison(rows: Sequence[Row]) -> str:
    """The before/after table."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        wanted = f" <small>{escape(row['better'])} is better</small>" if row.get("better") else ""
        lines.append(
            f'<tr><th scope="row">{escape(row["name"])}{wanted}</th>'
            f"<td>{_figure(row, 'before')}</td><td>{_figure(row, 'after')}</td>"
            f'<td class="{verdict(row)}">{escape(change(row))}</td></tr>'
        )
    return (
        '<div class="scroll"><table class="compare"><thead><tr><th></th><th>Before</th><th>After</th>'
        f"<th>Change</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _figure(row: Row, when: str) -> str:
    text = escape(number(row[when])) + _unit(row)
    if row.get(f"{when}_interval"):
        low, high = row[f"{when}_interval"]
        text += f" <small>{escape(number(low))} – {escape(number(high))}</small>"
    return text


def answers(samples: Sequence[Row]) -> str:
    """Prompt, and the two answers beside each other (below each other on a narrow screen)."""
    cards = []
    for sample in samples:
        sides = "".join(
            f'<div class="answer {when}"><h4>{title}</h4><div class="said">{_said(sample[when])}</div></div>'
            for when, title in (("before", "Before"), ("after", "After"))
        )
        cards.append(
            f'<article class="sample"><div class="prompt">{escape(sample["prompt"])}</div>'
            f'<div class="pair">{sides}</div></article>'
        )
    return "".join(cards)


def _said(text: str) -> str:
    return escape(text) if text.strip() else '<span class="empty">(nothing)</span>'


def charts(found: Series) -> str:
    """A chart for each curve that has more than one point."""
    figures = [
        f"<figure><figcaption>{escape(TITLES.get(name, name))}</figcaption>{line_chart(name, points)}"
        '<div class="tip" hidden></div></figure>'
        for name, points in found.items()
        if name not in NOT_CURVES and len(_finite(points)) > 1
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if abs(point[1]) < float("inf")]


def cost(record: Row, found: Series) -> list[tuple[str, str]]:
    """Time, memory and speed; the count of tokens where the metrics have `tokens`."""
    lines = [("Wall time", duration(record["wall_s"]))]
    if record.get("attempts", 1) > 1:
        lines.append(("Attempts", f"{record['attempts']}; the time is that of the last"))
    lines.append(("Peak memory (resident)", size(record["peak_rss_bytes"])))
    if found.get("step"):
        lines.append(("Steps", number(found["step"][-1][0])))
    if "tokens" in record["metrics"]:
        lines.append(("Tokens", number(record["metrics"]["tokens"])))
    if found.get("tokens_per_s"):
        speed = statistics.median(value for _, value in found["tokens_per_s"])
        lines.append(("Tokens per second (median)", number(round(speed, 1))))
    lines.append(("Device", machine(record["device"])))
    return lines


def environment(record: Row) -> list[tuple[str, str]]:
    git, device = record["git"], record["device"]
    state = {True: "with uncommitted changes", False: "clean", None: "unknown"}[git["dirty"]]
    return [
        ("Commit", f"{git['commit'] or 'none'} ({state})"),
        ("Lock (sha256 of requirements.txt)", record["lock_sha256"][:16]),
        ("Versions", ", ".join(f"{name} {v}" for name, v in record["versions"].items())),
        ("Devices", f"{device['count']} × {device['kind']} ({device['platform']})"),
        ("Processor", f"{device['cpu']}, {device['cores']} cores"),
        ("Seed", str(record["seed"])),
        ("Run", record["id"]),
    ]


def facts(lines: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines)
    return f"<dl>{rows}</dl>"


def config(record: Row) -> str:
    """Every field by its dotted name, folded away; the overrides of this run are marked."""
    changed = record.get("overrides", {})
    rows = []
    for name, value in flat(record["config"]):
        mark = (
            ' class="changed"' if any(f"{name}.".startswith(f"{key}.") for key in changed) else ""
        )
        rows.append(f"<tr{mark}><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>")
    return (
        f"<details><summary>{len(rows)} fields</summary>"
        f'<div class="scroll"><table class="config">{"".join(rows)}</table></div></details>'
    )


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """[('optim', 'AdamW'), ('optim.lr', '0.001'), ...] of a config in its JSON form."""
    if isinstance(value, dict):
        kind = value.get("type")
        lines = [(name or "config", kind.rsplit(":", 1)[-1])] if isinstance(kind, str) else []
        for key, item in value.items():
            if key != "type":
                lines += flat(item, f"{name}.{key}" if name else key)
        return lines
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [line for i, item in enumerate(value) for line in flat(item, f"{name}.{i}")]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)) or "()")]
    return [(name, str(value))]
