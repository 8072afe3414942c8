"""Steps and batches of one shape are traced once: a loop that recompiles takes minutes a step."""

import jax
import numpy as np
import pytest

from research.evaluate import nll
from research.models import decoder
from research.models.families.llama import llama
from research.objectives import next_token
from research.train.loop import Training, fit
from research.train.optim import AdamW, AdamW8bit
from research.train.schedules import Cosine
from research.train.sharding import make_mesh
from research.types import Source
from research.weights import lora

MODEL = decoder.Decoder(llama(32, 2, 16, 2, 2, 32, max_length=32))
FACTORS = ((lora.TRAINABLE, True), (r".*", False))


def batch_of(seed, rows=4, length=8):
    tokens = np.random.default_rng(seed).integers(1, 32, (rows, length + 1)).astype(np.int32)
    weights = np.full((rows, length), 1 / (rows * length), np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def source(length=lambda step: 8):
    def next_batch(step, params, context, rng, last_metrics):
        return batch_of(step, length=length(step)), step + 1

    return Source(lambda rng: 0, next_batch)


def counted(objective):
    """The objective, and a list that grows whenever its Python code runs: when it is traced."""
    traces = []

    def run(params, context, batch, rng):
        traces.append(batch["tokens"].shape)
        return objective(params, context, batch, rng)

    return run, traces


def traces_of(steps, batches=None, params=None, optimizer=AdamW(lr=1e-3), **options):
    objective, traces = counted(next_token(MODEL))
    params = decoder.init(MODEL, jax.random.key(0)) if params is None else params
    fit(objective, batches or source(), params, optimizer, Training(steps), **options)
    return traces


@pytest.mark.parametrize(
    "optimizer",
    [AdamW(lr=Cosine(1e-3, 5, 1)), AdamW8bit(lr=1e-3, min_size=256)],
    ids=["schedule", "8 bits"],
)
def test_all_steps_of_full_training_share_one_trace(optimizer):
    assert len(traces_of(1, optimizer=optimizer)) == len(traces_of(5, optimizer=optimizer)) == 1


def test_all_steps_of_lora_share_one_trace():
    params = lora.add(decoder.init(MODEL, jax.random.key(0)), r".*/kernel", jax.random.key(1), 2)
    assert len(traces_of(4, params=params, rule=FACTORS)) == 1


def test_steps_on_a_mesh_share_one_trace():
    mesh, names = make_mesh(data=2, fsdp=2), decoder.axes(MODEL)
    assert len(traces_of(4, mesh=mesh, names=names)) == 1


def test_another_shape_is_another_trace():
    traces = traces_of(4, source(lambda step: 8 if step < 2 else 6))
    assert traces == [(4, 8), (4, 6)]


def test_evaluation_traces_once_for_all_batches_of_a_shape_and_for_new_parameters():
    params = decoder.init(MODEL, jax.random.key(0))
    before = nll._batch_sums._cache_size()
    for seed in range(3):
        moved = jax.tree.map(lambda leaf, by=seed: leaf + by, params)
        nll.held_out(MODEL, moved, [batch_of(seed), batch_of(seed + 10)])
    assert nll._batch_sums._cache_size() == before + 1


def test_sequences_of_like_length_share_a_trace():
    params = decoder.init(MODEL, jax.random.key(0))
    before = nll._batch_log_probs._cache_size()
    for length in (9, 10, 11, 12):
        nll.of_sequences(MODEL, params, [list(range(1, length + 1))])
    assert nll._batch_log_probs._cache_size() == before + 1
