import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from perceptron import assert_bitwise, buffered_source, objective, params

from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.types import Source

HERE = Path(__file__).parent


def run_script(*arguments):
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(HERE / "resumable.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def order(directory):
    """{step: rows}: what was trained on last at each step."""
    lines = (directory / "order").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def test_killed_at_a_random_step_ends_bitwise_the_same(tmp_path):
    never = 10_000
    for accumulate in (1, 4):
        kill_at = random.randrange(7, 14)  # from 7 on, the save of step 3 is surely complete
        print(f"accumulation {accumulate}: killed at step {kill_at}")  # shown on failure
        killed = run_script(tmp_path / f"killed_{accumulate}", accumulate, kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    triples = [
        (tmp_path / f"{kind}_{accumulate}", accumulate, never)
        for kind in ("killed", "whole")
        for accumulate in (1, 4)
    ]
    done = run_script(*[argument for triple in triples for argument in triple])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed from step") == 2
    for accumulate in (1, 4):
        killed, whole = tmp_path / f"killed_{accumulate}", tmp_path / f"whole_{accumulate}"
        got, expected = np.load(killed / "final.npz"), np.load(whole / "final.npz")
        assert set(got) == set(expected) and len(set(got)) > 15
        for name in got:
            assert got[name].tobytes() == expected[name].tobytes(), name
        assert order(killed) == order(whole)
        metrics = [(path / "run" / "metrics.jsonl").read_text() for path in (killed, whole)]
        assert [text.count("\n") for text in metrics] == [2, 2]


class Stop(Exception):
    pass


def stopping(source, at):
    def next_batch(state, params, context, rng, last_metrics):
        if state["use"] == at:
            raise Stop
        return source.next(state, params, context, rng, last_metrics)

    return Source(source.init, next_batch)


def test_a_source_with_state_resumes_in_the_middle_of_its_buffer(tmp_path):
    def run(source, directory):
        config = Training(steps=12, save_every=3, directory=directory)
        return fit(objective, source, params(), AdamW(0.02), config)

    whole = run(buffered_source(), tmp_path / "whole")
    with pytest.raises(Stop):  # step 6 is saved, two steps into the second buffer
        run(stopping(buffered_source(), at=7), tmp_path / "stopped")
    resumed = run(buffered_source(), tmp_path / "stopped")
    assert_bitwise(resumed.state, whole.state)
    assert resumed.state.source_state["coefficient"] != 1.0
    assert isinstance(resumed.state.source_state["use"], int)
    assert jax.tree.leaves(resumed.state.opt_state)
