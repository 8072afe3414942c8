"""Bits of the formats by hand, the frontier, and the table and figure of made-up rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quantize_formats
from experiments.quantize_formats import BASE, KINDS, SWEEP, frontier
from experiments.shared import few_bits
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.weights.quantized import Quantized, encode

# Codes; float32 scales and zeros of 64 numbers, or of a row of 576; doubled ones 8 bits and a
# float32 for 256 of them.
BITS = {
    "Int8, row": 8 + 32 / 576,
    "E4M3, row": 8 + 32 / 576,
    "Int4 min-max, 32": 4 + 2 * 32 / 32,
    "Int4 min-max": 4 + 2 * 32 / 64,
    "Int4": 4 + 32 / 64,
    "NF4": 4 + 32 / 64,
    "Int4 + DQ": 4 + 8 / 64 + 32 / (64 * 256),
    "NF4 + DQ": 4 + 8 / 64 + 32 / (64 * 256),
    "Int3": 3 + 32 / 64,
    "Int2": 2 + 32 / 64,
}


@pytest.mark.parametrize("name", BITS)
def test_bits_by_hand(name):
    rows = jax.ShapeDtypeStruct((576, 576), jnp.float32)
    kept = jax.eval_shape(lambda rows: encode(rows, KINDS[name].format, True), rows)
    assert isinstance(kept, Quantized)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert 8 * held / 576**2 == pytest.approx(BITS[name], rel=2e-4)


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"text.length": 5}]):
        config = override(BASE, overrides)
        nll = 3 + 0.01 * number
        metrics = {"nll": nll, "nll_se": 0.1, "perplexity": float(np.exp(nll))}
        metrics |= {"full_perplexity": float(np.exp(3)), "rise": 0.01 * number, "rise_se": 0.002}
        metrics |= {"divergence": 0.02, "divergence_se": 0.001, "agreement": 0.9}
        metrics |= {"parameter_bytes": 2e8, "matrix_error": 0.09}
        if config.kind.format is not None:
            metrics["bits_per_parameter"] = 9.0 - 0.5 * number
        if config.kind.questions:
            metrics |= {"exam": 0.5, "exam_low": 0.4, "exam_high": 0.6}
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    lines = quantize_formats.table(made_up()).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:18]] == list(KINDS)
    assert lines[2] == (
        "| full | – | 200.0 | 0.0900 | 20.09 ± 2 | 0.0000 ± 0.002 | 0.0200 ± 0.001 | 0.900 |"
    )
    assert lines[3].startswith(
        "| Int8, row | 8.500 | 200.0 | 0.0900 | 20.29 ± 2 | 0.0100 ± 0.002 |"
    )
    assert lines[-1] == (
        "Exam, 95 %: full 0.500 (0.400 to 0.600); NF4 + DQ 0.500 (0.400 to 0.600)."
    )
    drawing = quantize_formats.figure(made_up())
    labels = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert labels == [name for name in KINDS if name != "full"]
    whole, few = drawing.axes
    assert whole.get_yscale() == "log" and len(whole.containers) == 15
    # Bits fall by a half a run: those of 4 to 5.1 bits are the runs 8, 9 and 10.
    assert [c.get_label() for c in few.containers] == ["E3M0", "FP4", "NF4"]


def test_frontier():
    points = {
        "a": (4.5, 20.0),
        "b": (4.1, 21.0),
        "c": (4.5, 19.0),
        "d": (5.0, 19.5),
        "e": (8.0, 18),
    }
    assert frontier(points) == ["b", "c", "e"]


def test_matrix_error_is_a_mean_over_matrices_and_layers():
    full = {"a": {"kernel": jnp.ones((2, 4, 4))}, "b": {"kernel": jnp.ones((4, 4))}}
    off = {"a": {"kernel": full["a"]["kernel"] * jnp.array([1.1, 1.3])[:, None, None]}}
    off["b"] = {"kernel": jnp.full((4, 4), 0.8)}
    assert few_bits.matrix_error(full, off, ".*") == pytest.approx((0.1 + 0.3 + 0.2) / 3, rel=1e-5)
