"""What a run's page compares."""

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
