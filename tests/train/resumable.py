"""A training script for test_resume: `python resumable.py DIRECTORY ACCUMULATE KILL_AT ...`, any
number of triples. The process kills itself when the batch of step KILL_AT is asked for."""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from perceptron import objective, params, source

from research.paths import named_leaves
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Source

STEPS = 14


def killing(kill_at, log):
    inner = source(8)

    def next_batch(state, *rest):
        if state["position"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch, after = inner.next(state, *rest)
        with log.open("a") as file:
            file.write(f"{state['position']} {batch['indices'].tolist()}\n")
        return batch, after

    return Source(inner.init, next_batch)


def train(directory, accumulate, kill_at):
    directory.mkdir(exist_ok=True)
    config = Training(
        steps=STEPS, accumulate=accumulate, save_every=3, ema_decay=0.9, directory=directory / "run"
    )
    optimizer = AdamW(Cosine(0.05, STEPS, 2), weight_decay=0.1)
    fitted = fit(objective, killing(kill_at, directory / "order"), params(), optimizer, config)
    state = fitted.state.replace(rng=jax.random.key_data(fitted.state.rng))
    arrays = {name.replace("/", "."): np.asarray(leaf) for name, leaf in named_leaves(state)}
    np.savez(directory / "final.npz", **arrays)


if __name__ == "__main__":
    for name, accumulate, kill_at in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        train(Path(name), int(accumulate), int(kill_at))
