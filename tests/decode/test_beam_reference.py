"""Beam search against what transformers found: a tiny model, and SmolLM2's real weights.

The sequences and scores are what scripts/references/beam_search.py writes (transformers 5.23.0).
"""

import json
from pathlib import Path

import numpy as np
import pytest

from research import hub
from research.decode import Beams, beam_search
from research.decode.generate import for_decoding
from research.hub.download import smollm2

HERE = Path(__file__).parent
GQA = HERE.parent / "hub/fixtures/tiny_llama/gqa"


def record(name):
    return json.loads((HERE / f"fixtures/beam_{name}.json").read_text())


def compare(base, table, atol):
    """All prompts in one batch, padded on the left; there, one by one. Four sequences, in order."""
    params, prompts = for_decoding(base.params), [p["ids"] for p in table["prompts"]]
    for setting, theirs in zip(table["settings"], table["found"], strict=True):
        setting = dict(setting)
        ngram = setting.pop("no_repeat_ngram_size", None)
        search = Beams(
            4,
            n_best=4,
            no_repeat_ngram=ngram,
            max_tokens=table["new"],
            stop_ids=tuple(table["stop"]),
            **setting,
        )
        ours = beam_search(base.model, params, prompts, search)
        for tokens, lengths, scores, expected in zip(
            ours.tokens, ours.lengths, ours.scores, theirs, strict=True
        ):
            rows = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
            assert rows == expected["rows"], setting
            np.testing.assert_allclose(scores, expected["scores"], atol=atol)


def test_tiny_model_equals_transformers():
    table = record("tiny")
    assert len(table["settings"]) == 10
    compare(hub.load(GQA), table, atol=2e-4)


@pytest.mark.weights
def test_smollm2_equals_transformers():
    base, table = hub.load(smollm2()), record("smollm2")
    prompts = table["prompts"]
    assert len(prompts) == 10
    assert [base.tokenizer.encode(p["text"]) for p in prompts] == [p["ids"] for p in prompts]
    compare(base, table, atol=2e-3)


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_the_fixture_has_ends_of_both_kinds(name):
    """Otherwise nothing is said about stop ids, or about the limit."""
    table = record(name)
    rows = [row for found in table["found"] for one in found for row in one["rows"]]
    assert any(row[-1] in table["stop"] and len(row) < table["new"] for row in rows)
    assert any(len(row) == table["new"] for row in rows)
