"""AdaLoRA's experiment: one budget, what is left of it, and the table and figure of made-up rows."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import adalora_ranks
from experiments.adalora_ranks import BASE, METHODS, SWEEP, final_parameters
from experiments.shared import sarcasm
from research.models import decoder
from research.models.families.llama import llama
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.weights import adalora, lora

LAYERS = 3
KINDS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def base():
    model = decoder.Decoder(llama(40, LAYERS, 24, 4, 2, 48, max_length=32, tied=True))
    return model, decoder.init(model, jax.random.key(0))


def test_both_end_with_one_budget_and_the_training_is_as_long_as_the_allocation(base):
    loras, adaloras = (dataclasses.replace(BASE, method=m) for m in METHODS.values())
    allocation = sarcasm.optimizer_of(sarcasm.ready(adaloras, *base), adaloras).finish
    assert allocation.total_steps == BASE.steps
    assert allocation.target_rank == loras.method.rank == adalora_ranks.RANK
    assert allocation.initial_steps < allocation.last_allocation < BASE.steps
    starts = adalora.ranks(sarcasm.ready(adaloras, *base).params)
    assert len(starts) == len(KINDS) and all(np.shape(n) == (LAYERS,) for n in starts.values())


def test_what_is_left_counts_only_triplets_that_act(base):
    rule = r".*/attention/q/kernel"
    pairs = lora.add(base[1], rule, jax.random.key(0), rank=4)
    assert final_parameters(pairs) == LAYERS * 4 * (24 + 24)
    triplets = adalora.add(base[1], rule, jax.random.key(0), rank=4)
    assert final_parameters(triplets) == 0
    q = triplets["stack_0"]["block_0"]["attention"]["q"]
    q["kernel"] = q["kernel"].replace(e=np.array([[1, 0, 2, 0], [0] * 4, [3, 3, 3, 3]], np.float32))
    assert final_parameters(triplets) == 6 * (24 + 1 + 24)


def made_up():
    rows = []
    for number, overrides in enumerate(SWEEP):
        config = override(BASE, overrides)
        metrics = {"accuracy": 0.6 + 0.1 * number, "nll": 0.6, "trainable_parameters": 3_000}
        metrics |= {"final_parameters": 2_000, "ranks": {}}
        if isinstance(config.method, adalora_ranks.methods.AdaLoRA):
            paths = [f"stack_0/block_0/attention/{k}/kernel" for k in sorted(KINDS)]
            lines = {path: [n, 2, 4 + config.seed] for n, path in enumerate(paths)}
            metrics["ranks"] = lines
        rows.append(
            {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        )
        rows[-1]["overrides"] = to_json(overrides)
    return rows


def test_table_and_figure():
    lines = adalora_ranks.table(made_up()).splitlines()
    assert lines[2] == "| LoRA, r = 4 | 3,000 | 2,000 | 0.65 ± 0.0707 | 0.6 ± 0 |"
    assert lines[3].startswith("| AdaLoRA, 6 to 4 | 3,000 | 2,000 | 0.85 ±")
    assert "| q | 3.50 | 4.00 | 2.00 | 4.50 |" in lines
    assert [line.split()[1] for line in lines[-7:]] == list(KINDS)
    axes = adalora_ranks.figure(made_up()).axes[0]
    assert axes.images[0].get_array().shape == (len(KINDS), LAYERS)
    assert axes.get_yticklabels()[0].get_text() == "W q"
