"""What a run's page compares."""

import json

from research.runs import page


def test_pairs_intervals_and_directions():
    metrics = {
        "before/nll": 2.0,
        "after/nll": 1.0,
        "before/exam_accuracy": 0.5,
        "before/exam_accuracy_low": 0.4,
        "before/exam_accuracy_high": 0.6,
        "after/exam_accuracy": 0.7,
        "after/exam_accuracy_low": 0.6,
        "after/exam_accuracy_high": 0.8,
        "after/alone": 3,
    }
    assert page.comparison({"metrics": metrics}) == [
        {"name": "nll", "before": 2.0, "after": 1.0, "better": "lower"},
        {
            "name": "exam_accuracy",
            "before": 0.5,
            "before_interval": (0.4, 0.6),
            "after": 0.7,
            "after_interval": (0.6, 0.8),
            "better": "higher",
        },
    ]


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    text = "a\u2028b\u0085c"
    row = json.dumps({"prompt": text}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert page.lines(tmp_path / "x.jsonl") == [{"prompt": text}] * 2
