"""What each method trains, and the table and figure of made-up rows."""

import jax
import pytest

from experiments import adapter_classification
from experiments.adapter_classification import BASE, METHODS, SWEEP
from experiments.shared import headline_classes
from research.models import decoder
from research.models.families.llama import llama
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.train.partition import partition

LAYERS, WIDTH = 2, 16
NORMS = (2 * LAYERS + 1) * WIDTH
HEAD = 2 * WIDTH


def adapter(size):
    return 2 * WIDTH * size + WIDTH + size


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("head alone", HEAD),
        *((f"Houlsby, size {n}", 2 * LAYERS * adapter(n) + NORMS + HEAD) for n in (2, 8, 32, 128)),
        ("Pfeiffer, size 32", LAYERS * adapter(32) + NORMS + HEAD),
    ],
)
def test_what_is_trained(name, expected):
    model = decoder.Decoder(llama(32, LAYERS, WIDTH, 4, 2, 24, tied=True))
    params, method = decoder.init(model, jax.random.key(0)), METHODS[name]
    if method.insert is not None:
        model, params = method.insert(model, params, jax.random.key(1), method.size)
    params = headline_classes.with_head(model, params, seed=0)
    trainable, _ = partition(params, method.trains)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == expected


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"steps": 5}]):
        config = override(BASE, overrides)
        names = list(METHODS.values())
        size = 1_000 * 2 ** names.index(config.method)
        metrics = {"accuracy": 0.6 + 0.01 * number, "trainable_parameters": size}
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    rows = made_up()
    lines = adapter_classification.table(rows).splitlines()
    assert lines[2] == "| head alone | 1,000 | 1.56 % | 0.635 ± 0.0495 |"  # 0.60 and 0.67
    assert lines[8].startswith("| all weights | 64,000 | 100 % |") and len(lines) == 11
    axes = adapter_classification.figure(rows).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["head alone", "Houlsby", "Pfeiffer", "all weights"]
    houlsby = axes.containers[1].lines[0]
    assert list(houlsby.get_xdata()) == [2_000, 4_000, 8_000, 16_000]
    assert list(houlsby.get_ydata()) == pytest.approx([0.645, 0.655, 0.665, 0.675])
