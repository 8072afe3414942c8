"""Pairs of answers: layouts, masks, what is left out, rows."""

import numpy as np
import pytest
from characters import encode

from research.data.preferences import (
    Preference,
    overlap,
    pair_rows,
    pairs,
    preference,
)
from research.data.rows import RowError

USER = [{"role": "user", "content": "2+2?"}]
LAYOUTS = {
    "llama-factory": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "text": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": USER, "chosen": "4", "rejected": "5"},
    "whole": {
        "chosen": [*USER, {"role": "assistant", "content": "4"}],
        "rejected": [*USER, {"role": "assistant", "content": "5"}],
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_the_same(name):
    assert preference(LAYOUTS[name]) == Preference(USER, "4", "5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "f:3: expected .* 'chosen' and 'rejected'"),
        (
            {"prompt": "a", "chosen": "b", "rejected": 3},
            "f:3: field 'rejected' must be text, got int",
        ),
        (
            {**LAYOUTS["llama-factory"], "chosen": {"from": "human", "value": "4"}},
            "is from 'human'",
        ),
        ({**LAYOUTS["llama-factory"], "extra": 1}, "f:3: unknown field 'extra'"),
        ({**LAYOUTS["whole"], "rejected": LAYOUTS["whole"]["chosen"][1:]}, "equal up to a last"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(RowError, match=message):
        preference(row, "f:3")


def test_only_the_two_answers_are_learned_and_stand_in_one_row():
    prompt = [*USER, {"role": "assistant", "content": "so"}, {"role": "user", "content": "?"}]
    examples, counts = pairs([("a", Preference(prompt, "four", "no"))], encode, 40)
    assert (counts.read, counts.kept, counts.truncated) == (1, 1, 0)
    row = {name: values[0] for name, values in pair_rows(examples, 30, pad_id=9).items()}
    asked = len("2+2?so?") + 3
    for segment, answer in ((1, "four"), (2, "no")):
        inside = row["segment_ids"] == segment
        assert inside.sum() == asked + len(answer) + 1
        targets = row["targets"][inside][row["weights"][inside] == 1]
        assert targets.tolist() == [*map(ord, answer), 0]
        np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
    assert not row["weights"][row["segment_ids"] == 0].any()
    with pytest.raises(ValueError, match="pair 0 has 28 tokens, more than the row's 27"):
        pair_rows(examples, 27)


def test_what_is_left_out_is_counted():
    rows = [
        ("same", Preference(USER, "4", "4")),
        ("empty", Preference(USER, " ", "4")),
        ("long prompt", Preference([{"role": "user", "content": "x" * 30}], "4", "5")),
        ("long answer", Preference(USER, "y" * 30, "5")),
    ]
    examples, counts = pairs(rows, encode, 16)
    assert (counts.read, counts.kept, counts.identical, counts.empty) == (4, 2, 1, 1)
    assert (counts.long_prompt, counts.truncated, counts.identical_dropped) == (1, 1, 0)
    assert len(examples[1].chosen.tokens) == 16
    examples, counts = pairs(rows, encode, 16, drop_identical=True)
    assert (counts.kept, counts.identical_dropped) == (1, 1) and len(examples) == 1
    with pytest.raises(ValueError, match="no pair of answers remains: PairCounts"):
        pairs(rows[1:2], encode, 16)


def test_an_encoder_that_refuses_is_named():
    def refuse(messages):
        raise ValueError("no system messages")

    with pytest.raises(ValueError, match="line 7: no system messages"):
        pairs([("line 7", Preference(USER, "a", "b"))], refuse, 16)


def test_leaks_between_splits_are_found():
    other = Preference([{"role": "user", "content": "3+3?"}], "6", "7")
    spaced = Preference([{"role": "user", "content": " 2+2? "}], "four", "five")
    assert overlap([Preference(USER, "4", "5")], [other, spaced]) == [spaced]
