"""Which tokens belong to which answer, what each loss learns, and the table of made-up rows."""

import json

import numpy as np
import pytest

from experiments import vicuna
from experiments.shared import sft, small_lm
from experiments.vicuna import BASE, SWEEP, answers, every_token, turn_numbers, two_speakers
from research.runs import override
from research.runs.canonical import run_id, to_json

MESSAGES = [
    {"role": "system", "content": "tools"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "call"},
    {"role": "tool", "content": "result"},
    {"role": "assistant", "content": "done"},
]


def letters():
    return small_lm.bpe(["tools USER: hello ASSISTANT: call result done"], 257)


def test_turns_are_counted_from_one_up_to_the_most():
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 1, 0.5])
    assert turn_numbers(mask, 5).tolist() == [0, 1, 1, 0, 0, 2, 0, 3, 3]
    assert turn_numbers(mask, 2).tolist() == [0, 1, 1, 0, 0, 2, 0, 2, 2]
    assert turn_numbers(np.ones(2), 2).tolist() == [1, 1]


def test_answers_and_their_ends_are_learned_or_every_token():
    tokenizer = letters()
    ids, mask = answers(tokenizer, MESSAGES)
    end = small_lm.END
    whole = f"{end}tools USER: hello ASSISTANT: call{end}USER: result ASSISTANT: done{end}"
    assert tokenizer.decode(ids, skip_special=False) == whole
    learned = tokenizer.decode(ids[mask > 0], skip_special=False)
    assert learned == f" call{end} done{end}"
    same, all_of_it = every_token(tokenizer, MESSAGES)
    np.testing.assert_array_equal(same, ids)
    assert (all_of_it == 1).all()


def test_a_tool_speaks_as_the_user_and_nothing_else_changes():
    roles = [message["role"] for message in two_speakers(MESSAGES)]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert MESSAGES[3]["role"] == "tool"


@pytest.mark.data
def test_every_conversation_fits_the_layout_and_has_two_answers():
    rows = vicuna.conversations()
    assert len(rows) == 261
    for _, messages in rows:
        roles = [m["role"] for m in two_speakers(messages) if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) >= 4


@pytest.mark.data
def test_nothing_that_begins_as_a_held_out_conversation_is_trained_on():
    train, held_out = sft.split(vicuna.conversations(), BASE.held_out, vicuna.first_question)
    first = {vicuna.first_question(row) for row in held_out}
    assert len(held_out) == BASE.held_out and len(train) == 213
    assert not first & {vicuna.first_question(row) for row in train}


def made_up(tmp_path=None):
    rows = []
    for number, overrides in enumerate(SWEEP):
        config = override(BASE, overrides)
        names = [f"turn_{n}" for n in range(1, 5)] + ["answers", "rest"]
        metrics = {f"nll/{name}": 1.0 + number + 0.1 * i for i, name in enumerate(names)}
        metrics |= {f"tokens/{name}": 10 * (i + 1) for i, name in enumerate(names)}
        row = {"id": run_id("made_up", config), "config": to_json(config)}
        row |= {"overrides": to_json(overrides), "metrics": metrics | {"tokens/turn_5": 0}}
        rows.append(row)
        if tmp_path is not None:
            (tmp_path / row["id"]).mkdir()
            (tmp_path / row["id"] / "talk.json").write_text(json.dumps([f"said {number}"] * 3))
    return rows


def test_table_and_figure_leave_out_answers_that_nobody_gave():
    lines = vicuna.table(made_up()).splitlines()
    assert lines[0] == "| loss on | answer 1 | answer 2 | answer 3 | answer 4 | answers | rest |"
    assert lines[2] == "| before | 1 | 1.1 | 1.2 | 1.3 | 1.4 | 1.5 |"
    assert lines[4] == "| every token | 3 | 3.1 | 3.2 | 3.3 | 3.4 | 3.5 |"
    assert lines[5] == "| tokens | 10 | 20 | 30 | 40 | 50 | 60 |"
    axes = vicuna.figure(made_up()).axes[0]
    assert [line.get_label() for line in axes.lines] == ["before", "answers only", "every token"]
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [2, 2.1, 2.2, 2.3])


def test_samples_show_each_question_with_each_model(tmp_path):
    text = vicuna.samples(made_up(tmp_path), tmp_path)
    assert text.count("| before | ") == 3 and "| every token | answer 3 | said 2 |" in text
