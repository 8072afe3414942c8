"""The table, figure and samples of made-up rows of Alpaca in two languages."""

import json

import pytest

from experiments import alpaca
from experiments.alpaca import BASE, SWEEP, TRAINED
from experiments.shared import probe
from research.runs import override
from research.runs.canonical import run_id, to_json


def made_up(tmp_path=None):
    rows = []
    for number, overrides in enumerate([*SWEEP, {"steps": 5}]):
        config = override(BASE, overrides)
        metrics = {}
        for place, language in enumerate(alpaca.LANGUAGES):
            value = 1.0 + number + place / 2
            names = ("nll", "bits_per_byte", "rouge_l", "chrf", "in_language")
            metrics |= {f"{language}/{name}": value for name in names}
            metrics |= {f"{language}/followed": number, f"{language}/asked": 8}
        row = {"id": run_id("made_up", config), "config": to_json(config)}
        rows.append(row | {"overrides": to_json(overrides), "metrics": metrics})
        if tmp_path is not None:
            (tmp_path / row["id"]).mkdir()
            said = [f"said {number}"] * len(probe.ITEMS)
            (tmp_path / row["id"] / "probe.json").write_text(json.dumps(said))
    return rows


def test_a_line_for_each_language_and_each_training():
    lines = alpaca.table(made_up()).splitlines()
    assert lines[2] == "| English | before | 1 | 1 | 1 | 1 | 1 | 0 of 8 |"
    assert lines[9] == "| Chinese | both | 4.5 | 4.5 | 4.5 | 4.5 | 4.5 | 3 of 8 |"
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 2 * len(TRAINED)


def test_the_figure_has_bits_and_shares_of_both_languages():
    bits, shares = alpaca.figure(made_up()).axes
    heights = [bar.get_height() for bar in bits.patches]
    assert heights == pytest.approx([1, 2, 3, 4, 1.5, 2.5, 3.5, 4.5])
    assert [bar.get_height() for bar in shares.patches] == pytest.approx(
        [0, 1 / 8, 2 / 8, 3 / 8] * 2
    )


def test_samples_show_every_instruction_with_every_model(tmp_path):
    text = alpaca.samples(made_up(tmp_path), tmp_path)
    assert all(text.count(f"said {number}") == len(probe.ITEMS) for number in range(4))
    assert "said 4" not in text
    # "said 3" is a sentence in small letters with two words: it follows some of the rules.
    assert "| both | followed | said 3 |" in text and "| both | not | said 3 |" in text
