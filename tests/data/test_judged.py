"""Single answers: rows, what is left out, partners, batches."""

import numpy as np
import pytest
from characters import encode

from research.data.judged import Judged, answer_rows, answers, judged, split_pairs
from research.data.preferences import Preference
from research.data.rows import RowError
from research.data.source import answer_source


def asked(text):
    return [{"role": "user", "content": text}]


def supervised(row, segment):
    inside = (row["segment_ids"] == segment) & (row["weights"] != 0)
    return "".join(map(chr, row["targets"][inside][:-1]))


def test_rows_say_prompt_answer_and_label():
    row = {"prompt": "2+2?", "completion": "4", "label": True}
    assert judged(row) == Judged(asked("2+2?"), "4", True)
    assert judged({**row, "prompt": asked("2+2?"), "label": False}).good is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1}, "f:3: field 'label' must be true or false, got 1"),
        ({"label": None}, "f:3: field 'label' must be true or false, got None"),
        ({"label": "true"}, "f:3: field 'label' must be true or false, got 'true'"),
        ({"completion": None}, "f:3: field 'completion' must be text, got NoneType"),
        ({"prompt": None}, "f:3: expected an object with the field 'prompt'"),
        ({"prompt": [{"role": "user"}]}, "f:3: prompt"),
    ],
)
def test_bad_rows(change, message):
    with pytest.raises(RowError, match=message):
        judged({"prompt": "2+2?", "completion": "4", "label": True} | change, "f:3")


def test_a_row_holds_the_answer_and_another_prompts():
    pairs = [
        ("p", Preference(asked("2+2?"), "four", "five")),
        ("q", Preference(asked("sky?"), "blue", "red")),
    ]
    rows = split_pairs(pairs)
    assert [(place, row.answer, row.good) for place, row in rows] == [
        ("p", "four", True),
        ("p", "five", False),
        ("q", "blue", True),
        ("q", "red", False),
    ]
    examples, counts = answers(rows, encode, 16)
    assert (counts.read, counts.kept, counts.good, counts.bad) == (4, 4, 2, 2)
    table = answer_rows(examples, 24)
    assert table["good"].tolist() == [True, False, True, False]
    found = [{name: values[i] for name, values in table.items()} for i in range(4)]
    assert [supervised(row, 1) for row in found] == ["four", "five", "blue", "red"]
    # The next answer to another prompt, round the end.
    assert [supervised(row, 2) for row in found] == ["blue", "blue", "four", "four"]
    prompts = [row["tokens"][row["segment_ids"] == 2][:4].tolist() for row in found]
    assert prompts == [[*map(ord, p)] for p in ("2+2?", "2+2?", "sky?", "sky?")]
    with pytest.raises(ValueError, match="answer 0 needs 20 tokens, more than the row's 19"):
        answer_rows(examples, 19)


def test_what_is_left_out_is_counted():
    rows = [
        ("good", Judged(asked("a"), "yes", True)),
        ("empty", Judged(asked("b"), " ", True)),
        ("long prompt", Judged(asked("x" * 30), "no", False)),
        ("long answer", Judged(asked("c"), "y" * 30, False)),
    ]
    examples, counts = answers(rows, encode, 16)
    assert (counts.read, counts.kept, counts.empty, counts.long_prompt) == (4, 2, 1, 1)
    assert (counts.good, counts.bad, counts.truncated) == (1, 1, 1)
    assert [len(x.own.tokens) for x in examples] == [6, 16]
    with pytest.raises(ValueError, match="no answer remains: AnswerCounts"):
        answers(rows[1:2], encode, 16)
    with pytest.raises(ValueError, match="all answers are to one prompt"):
        answers([rows[0], ("again", Judged(asked(" a "), "no", False))], encode, 16)


def test_a_source_gives_answers_that_weigh_alike():
    rows = [(str(i), Judged(asked(str(i)), "yes", i % 2 == 0)) for i in range(4)]
    table = answer_rows(answers(rows, encode, 16)[0], 16)
    source = answer_source(table, 2, seed=0)
    state, seen = source.init(None), []
    for _ in range(2):
        batch, state = source.next(state)
        assert batch["answer_weights"].tolist() == [0.5, 0.5]
        seen += [chr(t) for t in batch["tokens"][:, 0]]
    assert sorted(seen) == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="a batch of 1 has too few, take 2 or more"):
        answer_source(table, 1, 0)
    with pytest.raises(ValueError, match="the table has no answers"):
        answer_source({"tokens": np.zeros((0, 4))}, 2, 0)
