"""The table and figure of made-up rows, and text enough to calibrate."""

import numpy as np
import pytest

from experiments import gptq_vs_awq_vs_rtn
from experiments.gptq_vs_awq_vs_rtn import BASE, SWEEP, WAYS
from research.runs import override
from research.runs.canonical import run_id, to_json


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"layers": 2}]):
        config = override(BASE, overrides)
        rise = 0.01 * (1 + number)
        metrics = {"nll": 3 + rise, "nll_se": 0.1, "perplexity": float(np.exp(3 + rise))}
        metrics |= {"full_perplexity": float(np.exp(3)), "rise": rise, "rise_se": 0.002}
        metrics |= {"divergence": 2 * rise, "divergence_se": 0.001, "agreement": 0.9}
        metrics |= {"parameter_bytes": 2e8, "bits_per_parameter": config.bits + 0.625}
        if config.way is not WAYS["AWQ"]:
            metrics["matrix_error"] = 0.1
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    lines = gptq_vs_awq_vs_rtn.table(made_up()).splitlines()
    without = [way for way in WAYS if way != "GPTQ, act-order"]
    shown = [line.split("|")[1].strip() for line in lines[2:18]]
    assert shown == [*without, *WAYS, *without]
    assert lines[2] == (
        "| RTN | 4.625 | 0.1000 | 20.29 ± 2 | 0.0100 ± 0.002 | 0.0200 ± 0.001 | 0.900 |"
    )
    assert lines[9].startswith("| AWQ | 3.625 | – | 21.54 ± 2.2 | 0.0700 ± 0.002 |")
    assert lines[19].startswith("Full model: perplexity 20.09. Nats a token")
    rise, divergence = gptq_vs_awq_vs_rtn.figure(made_up()).axes
    assert [c.get_label() for c in rise.containers] == list(WAYS)
    # Bits 4, 3 and 2 of the last way in one panel, of the first in the other.
    assert list(rise.containers[3].lines[0].get_xdata()) == [4, 3, 2]
    assert list(rise.containers[3].lines[0].get_ydata()) == pytest.approx([0.04, 0.08, 0.12])
    assert list(divergence.containers[0].lines[0].get_ydata()) == pytest.approx([0.02, 0.1, 0.18])


def test_calibration_has_tokens_enough():
    """As many as the widest matrix of the model has inputs, also in the smoke run."""
    smoke = override(BASE, gptq_vs_awq_vs_rtn.SMOKE)
    for text in (BASE.text, smoke.text):
        assert text.length * text.calibration >= 1536
