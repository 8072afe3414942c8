import html
import json
import os
import re
from html.parser import HTMLParser

import pytest

from research import report
from research.report import sections
from research.report.text import duration, number, size

RECORD = {
    "id": "sft-0a1b2c3d4e",
    "experiment": "sft_small",
    "overrides": {"optim.lr": 2e-4},
    "seed": 0,
    "metrics": {},
    "wall_s": 612.4,
    "peak_rss_bytes": 3 * 2**30,
    "attempts": 2,
    "started": "2026-01-02T03:04:05+00:00",
    "git": {"commit": "5a0bb10" + "0" * 33, "dirty": True},
    "lock_sha256": "ab" * 32,
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "device": {
        "platform": "cpu",
        "kind": "cpu",
        "count": 1,
        "processes": 1,
        "cpu": "Some CPU",
        "cores": 2,
    },
    "config": {"type": "m:Config", "optim": {"type": "m:AdamW", "lr": 2e-4}, "seed": 0},
}
CURVES = [{"step": s, "loss": 3.0 - s / 10, "learning_rate": 1e-3} for s in range(1, 11)]
CURVES += [{"step": s, "eval/nll": 2.5 - s / 10} for s in (0, 5, 10)]
COMPARISON = [{"name": "NLL", "before": 2.0, "after": 1.5, "better": "lower", "unit": "nats"}]
SAMPLES = [{"prompt": "Say hello.", "before": "no", "after": "Hello!"}]


class Reader(HTMLParser):
    """Counts elements, collects what refers elsewhere, and checks that tags are closed in order."""

    VOID = ("meta", "line", "circle", "path")

    def __init__(self, text):
        super().__init__()
        self.elements, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def test_a_page_is_well_formed_refers_to_nothing_and_shows_what_it_was_given():
    text = report.render(RECORD, CURVES, COMPARISON, SAMPLES, ["Run `chat`."], title="A title")
    page = Reader(text)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.count("svg") == 3  # loss, held-out NLL, learning rate
    assert page.count("article") == 1
    for shown in (
        "A title",
        "10 min 12 s",
        "3.00 GiB",
        "−0.5 (−25.0%)",
        "<code>chat</code>",
        "optim.lr",
        "2 cores of Some CPU",
        "with uncommitted changes",
        "2; the time is that of the last",
    ):
        assert shown in text, shown


def test_every_text_of_a_run_is_escaped():
    evil = "<script>alert('x')</script>\"&"
    record = {**RECORD, "config": {"type": "m:C", "name": evil}, "versions": {"jax": evil}}
    comparison = [{**COMPARISON[0], "name": evil, "unit": evil}]
    sample = {"prompt": evil, "before": evil, "after": evil}
    curves = [{"step": s, evil: s} for s in (1, 2)]
    text = report.render(record, curves, comparison, [sample], [evil, f"`{evil}`"], title=evil)
    assert evil not in text
    assert text.count("<script>") == 1  # the page's own
    assert text.count(html.escape(evil)) >= 9
    assert Reader(text).open == []


def test_a_repeated_step_counts_once_with_its_last_value():
    curves = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "loss": 1.25}]
    text = report.render(RECORD, curves, [], [])
    points = next(a["data-points"] for tag, a in Reader(text).elements if tag == "svg")
    assert [row[2:] for row in json.loads(points)] == [[1, "9"], [2, "1.25"]]


def test_evaluations_are_told_from_training_by_their_split():
    curves = [{"step": s, "split": "train", "loss": 2.0, "elapsed_s": 1.0} for s in (1, 2)]
    curves += [{"step": s, "split": "eval", "nll": 1.0, "loss": 7.0} for s in (0, 2)]
    found = sections.series(curves)
    assert found["eval/nll"] == [(0, 1.0), (2, 1.0)]
    assert found["loss"] == [(1, 2.0), (2, 2.0)]
    assert found["eval/loss"] == [(0, 7.0), (2, 7.0)]
    text = report.render(RECORD, curves, [], [])
    assert "Held-out NLL (nats per token)" in text
    assert "elapsed_s" not in text


def test_sections_without_content_are_left_out():
    text = report.render(RECORD, [], [], [])
    assert "What changed" not in text
    assert "Training" not in text
    assert "Environment" in text


def test_better_and_worse_are_told_apart():
    rows = [
        {"name": "a", "before": 1.0, "after": 2.0, "better": "lower"},
        {"name": "b", "before": 1.0, "after": 2.0, "better": "higher"},
        {"name": "c", "before": 1.0, "after": 2.0},
    ]
    text = report.render(RECORD, [], rows, [])
    assert re.findall(r'<td class="(\w*)">', text) == ["bad", "good", ""]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([], [{"name": "a", "before": 1}], []), r"before_after\[0\] lacks \['after'\]"),
        (([], [], [{"prompt": "p"}]), r"samples\[0\] lacks \['before', 'after'\]"),
        (([{"loss": 1}], [], []), r"curves\[0\] lacks \['step'\]"),
    ],
)
def test_a_row_that_lacks_something_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        report.render(RECORD, *arguments)


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = report.write(tmp_path / "deep" / "report.html", RECORD, CURVES, COMPARISON, SAMPLES)
    before = path.read_bytes()
    assert before.decode() == report.render(RECORD, CURVES, COMPARISON, SAMPLES)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        report.write(path, RECORD, [], [], [])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (1.5694, "1.569"),
        (2e-4, "2e-4"),
        (1.5e-5, "1.5e-5"),
        (123456, "123,456"),
        (12345.6, "12,346"),
        (2.5e7, "25,000,000"),
        (0.05, "0.05"),
        (float("nan"), "nan"),
        (-0.25, "-0.25"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_durations_and_sizes():
    assert [duration(s) for s in (1.24, 42.4, 723, 11220)] == [
        "1.2 s",
        "42 s",
        "12 min 03 s",
        "3 h 07 min",
    ]
    assert [size(n) for n in (12, 1536, 5 * 2**20, int(3.5 * 2**30))] == [
        "12 B",
        "1.5 KiB",
        "5 MiB",
        "3.50 GiB",
    ]
