"""The table and the figure of made-up rows, and the rows that all methods see."""

import numpy as np
import pytest
from test_lora_targets import Letters

from experiments import peft_compare
from experiments.peft_compare import BASE, SWEEP
from experiments.shared import sarcasm
from experiments.shared.methods import METHODS
from research.runs import override
from research.runs.canonical import run_id, to_json

COSTS = {"peak_bytes": 2e9, "temporary_bytes": 5e8, "optimizer_bytes": 1e6, "s_per_step": 0.5}


def made_up():
    rows = []
    for overrides in SWEEP:
        config = override(BASE, overrides)
        name = next(name for name, method in METHODS.items() if method == config.method)
        metrics = {"accuracy": 0.6 + 0.1 * config.seed, "nll": 0.5, "parameters": 1_000_000}
        metrics["trainable_parameters"] = {"nothing": 0, "full": 1_000_000}.get(name, 10_000)
        if name != "nothing":
            metrics |= COSTS | {"flops": 9e10 if name == "full" else 6e10}
        rows.append(
            {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        )
        rows[-1]["overrides"] = to_json(overrides)
    return rows


def test_table_and_figure():
    table = peft_compare.table(made_up())
    assert "\n2 seeds, mean" in table
    lines = table.splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in lines[2:]}
    assert cells["nothing"][:4] == ["0", "0.000%", "0.6", "0.5"]
    assert cells["nothing"][4:] == ["–", "–", "–", "–", "– |"]
    assert cells["LoRA"][:3] == ["10,000", "1.000%", "0.65 ± 0.0707"]
    assert cells["LoRA"][4:] == ["2,000", "500", "1.00", "60.0 (0.67)", "0.50 |"]
    assert cells["full"][7] == "90.0 (1.00)"
    axes = peft_compare.figure(made_up()).axes[0]
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(shown) == {"untrained", *METHODS} - set(peft_compare.LEFT_OUT)


@pytest.mark.data
def test_rows_hold_one_short_headline_each_and_the_prompt_before_it():
    plain = sarcasm.read_rows(Letters(), train=30, test=20, length=80)
    assert plain.labels == [1, 2]
    assert plain.train["tokens"].shape == (30, 80) and plain.test["tokens"].shape == (20, 80)
    for table in (plain.train, plain.test):
        asked = table["weights"] != 0
        assert np.all(asked.sum(-1) == 1) and table["segment_ids"].max() == 1
        assert set(table["targets"][asked]) == {1, 2}
    prompted = sarcasm.read_rows(Letters(), train=30, test=20, length=80, before=(500, 501))
    np.testing.assert_array_equal(prompted.train["tokens"][:, :2], [[500, 501]] * 30)
    np.testing.assert_array_equal(prompted.train["tokens"][:, 2:], plain.train["tokens"])
    np.testing.assert_array_equal(prompted.train["weights"][:, 2:], plain.train["weights"])
    with pytest.raises(ValueError, match="headlines have at most 1 tokens, not 50"):
        sarcasm.read_rows(Letters(), train=30, test=20, length=1)
