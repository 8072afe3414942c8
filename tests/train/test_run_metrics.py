import jax.numpy as jnp
import pytest

from research.train.metrics import Meter, MetricsLog, describe, read
from research.types import Mean


def test_rows_after_the_resumed_step_are_dropped_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": step / 2})
    assert [row["step"] for row in read(path)] == [1, 2, 3]  # flushed while still open
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(path, 2)
    log.write({"step": 3, "loss": 9.0})
    log.close()
    assert read(path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


def test_a_bad_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON row"):
        read(path)


def test_means_add_over_steps_by_their_counts():
    meter = Meter()
    meter.add(
        {"nll": Mean(jnp.float32(6.0), jnp.float32(2.0)), "input_tokens": Mean(*jnp.ones(2) * 30)}
    )
    meter.add(
        {"nll": Mean(jnp.float32(1.0), jnp.float32(8.0)), "input_tokens": Mean(*jnp.ones(2) * 10)}
    )
    row = meter.row(2)
    assert row["nll"] == pytest.approx(0.7)
    assert row["tokens_per_s"] * row["s_per_step"] == pytest.approx(20.0)
    assert "nll" not in meter.row(3)


def test_one_line_for_people():
    row = {"step": 10, "loss": 2.5, "tokens_per_s": 8123.4, "s_per_step": 2.0}
    assert describe(row, 110) == "loss 2.5000  8,123 tokens/s  3:20 left"
    assert describe({**row, "s_per_step": 60.0}, 110).endswith("1:40:00 left")
