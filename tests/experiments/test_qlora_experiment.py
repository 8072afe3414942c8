"""What stands where under each way, the standard error by hand, and the table and figure of made-up rows."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import qlora
from experiments.qlora import BASE, SWEEP, WAYS, left
from experiments.shared import few_bits, few_bits_tuning
from experiments.shared.few_bits_tuning import NF4, Way, in_few_bits, optimizer_of, prepared
from research.evaluate.nll import Likelihood
from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.train.optim import AdamW8bit, Paged
from research.weights.base import is_weight
from research.weights.lora import LoRA
from research.weights.quantized import Quantized

MODEL = decoder.Decoder(llama(32, 1, 64, 2, 2, 64, tied=True))


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


def weights_of(params):
    return {n: w for n, w in named_leaves(params, is_leaf=is_weight) if is_weight(w)}


@pytest.mark.parametrize("name", WAYS)
def test_what_stands_where(params, name):
    way = dataclasses.replace(WAYS[name], rank=min(WAYS[name].rank, 4))
    start, rule = prepared(way, params, seed=0)
    nodes = weights_of(start)
    if not way.rank:
        assert not nodes and rule == r".*"
        rounded = weights_of(in_few_bits(start, way.format))
        assert len(rounded) == 7 and all(isinstance(w, Quantized) for w in rounded.values())
        return
    over = {n: w for n, w in nodes.items() if n.startswith("stack_0")}
    assert len(over) == 7 and all(isinstance(w, LoRA) for w in over.values())
    assert all(isinstance(w.base, Quantized) == bool(way.quantized) for w in over.values())
    assert isinstance(nodes.get("embed/table"), Quantized) == (way.quantized == few_bits.ALL)
    rounded = weights_of(in_few_bits(start, way.format))
    assert all(isinstance(w, Quantized) and w.format == NF4 for w in rounded.values())
    assert rounded.keys() == over.keys() | (nodes.keys() - over.keys())


def test_the_optimizer_is_the_ways_with_the_schedule():
    way = dataclasses.replace(WAYS["QLoRA"], paged=True)
    paged = optimizer_of(way, BASE)
    assert isinstance(paged, Paged) and isinstance(paged.optimizer, AdamW8bit)
    assert paged.optimizer.lr.peak == way.lr and paged.optimizer.lr.steps == BASE.steps


def test_ways_that_cannot_be():
    with pytest.raises(ValueError, match="codes do not train"):
        Way(rank=0, quantized=few_bits.LINEAR)
    with pytest.raises(ValueError, match="LoftQ fits"):
        Way(quantized=few_bits.ALL, loftq_steps=1)


def test_the_error_of_a_rise_by_hand():
    """Rows of equal length: the standard error of the mean of their rises."""
    base = [Likelihood(10.0, 10), Likelihood(20.0, 10), Likelihood(30.0, 10)]
    rows = [Likelihood(11.0, 10), Likelihood(23.0, 10), Likelihood(35.0, 10)]
    mean, error = few_bits_tuning.rise(rows, base)
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(np.std([0.1, 0.3, 0.5], ddof=1) / 3**0.5)
    with pytest.raises(ValueError, match="two packed rows or more, not 1"):
        few_bits_tuning.rise(rows[:1], base[:1])


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"steps": 5}]):
        config = override(BASE, overrides)
        quantized = bool(config.way.quantized)
        metrics = {"dense/nll": 1.7, "before/nll": 1.8 if quantized else 1.7, "before/exam": 0.5}
        metrics |= {"after/nll": 1.6 + 0.01 * number, "after/exam": 0.5, "s_per_step": 5.0}
        metrics |= {"few_bits/nll": 1.7, "held/parameter_bytes": 2e8, "cost/optimizer_bytes": 1e7}
        metrics |= {"cost/kept/peak_bytes": 3e9, "cost/again/peak_bytes": 1e9}
        metrics |= {f"diagnosis/{name}": 1.0 for name in qlora.FINDINGS} | {"diagnosis/rows": 7.0}
        if quantized:
            metrics |= {"before/rise": 0.1, "before/rise_se": 0.01}
        if config.way.rank:
            metrics["merged/nll"] = 1.61
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    lines = qlora.table(made_up()).splitlines()[2 : 2 + len(WAYS)]
    assert [line.split("|")[1].strip() for line in lines] == list(WAYS)
    assert "| 1.700 | – | 1.600 | – | 1.700 |" in lines[0]  # all weights: no gap, nothing to merge
    assert "1.800 (+0.100 ± 0.010)" in lines[2]
    assert "| 10% | 1.620 | 1.610 | 1.700 |" in lines[2] and lines[2].endswith("| 7 of 7 |")
    groups = qlora.ways(made_up())
    assert left(groups["QLoRA"], groups["LoRA"]) == pytest.approx(0.1)
    (axes,) = qlora.figure(made_up()).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == list(WAYS)
    assert len(axes.lines) == 4
