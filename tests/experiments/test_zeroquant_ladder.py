"""What a rung makes of a model, and the table and figure of made-up rows."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import zeroquant_ladder
from experiments.zeroquant_ladder import BASE, BITS, RUNGS, SWEEP, layer_errors, quantized
from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.weights.base import is_weight
from research.weights.int8 import QuantizedInputs

MODEL = decoder.Decoder(llama(32, 2, 64, 2, 2, 128, init_std=0.3))
WINDOWS = np.random.default_rng(0).integers(0, 32, size=(4, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("name", RUNGS)
def test_every_matrix_of_a_block_has_the_rungs_scales(params, name, bits):
    rung = dataclasses.replace(RUNGS[name], steps=min(RUNGS[name].steps, 2))
    made, errors = quantized(
        dataclasses.replace(BASE, bits=bits, rung=rung), MODEL, params, WINDOWS
    )
    found = [w for w in jax.tree.leaves(made, is_leaf=is_weight) if is_weight(w)]
    assert len(found) == 7 and all(isinstance(w, QuantizedInputs) for w in found)
    assert {(w.per, w.bits, w.base.format.bits) for w in found} == {(rung.per, 8, bits)}
    groups = {"down": 1 if rung.group == "row" else 2}  # of 128 inputs; the others have 64
    for name, w in named_leaves(made["stack_0"], is_leaf=is_weight):
        if is_weight(w):
            assert w.base.scale.shape[-1] == groups.get(name.split("/")[-2], 1)
    assert len(layer_errors(errors, "before")) == (2 if rung.steps else 0)
    if rung.steps:
        pairs = zip(layer_errors(errors, "after"), layer_errors(errors, "before"), strict=True)
        assert all(after <= before for after, before in pairs)


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"text.length": 5}]):
        config = override(BASE, overrides)
        nll = 3.5 - 0.01 * number
        metrics = {"nll": nll, "nll_se": 0.1, "perplexity": float(np.exp(nll))}
        metrics |= {"full_perplexity": float(np.exp(3)), "rise": nll - 3, "rise_se": 0.002}
        metrics |= {"divergence": 0.02, "divergence_se": 0.001, "agreement": 0.9}
        metrics |= {
            "matrix_error": 0.01,
            "parameter_bytes": 2e8,
            "bits_per_parameter": config.bits + 0.5,
        }
        if config.rung.steps:
            metrics |= {f"layer_before/{n:02}": 0.2 + n for n in range(12)}
            metrics |= {f"layer_after/{n:02}": 0.1 + n for n in range(12)}
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    lines = zeroquant_ladder.table(made_up()).splitlines()[2:10]
    named = [[part.strip() for part in line.split("|")[1:3]] for line in lines]
    assert named == [[bits, rung] for bits in BITS for rung in RUNGS]
    assert lines[4] == (
        "| W4A8 | RTN | 4.50 | 200 | 0.0100 | 31.82 ± 3.2 | 0.4600 ± 0.002 | 0.0200 ± 0.001 | 0.900 |"
    )
    rises, errors = zeroquant_ladder.figure(made_up()).axes
    assert len(rises.containers) == len(BITS) and len(errors.lines) == 2 * len(BITS)
    assert list(rises.containers[1].lines[0].get_ydata()) == pytest.approx([0.46, 0.45, 0.44, 0.43])
    np.testing.assert_allclose(errors.lines[1].get_ydata(), 0.1 + np.arange(12))


def test_a_figure_without_distilled_models():
    rows = [row for row in made_up() if "layer_after/00" not in row["metrics"]]
    assert not zeroquant_ladder.figure(rows).axes[1].lines
