"""Rows of each format as messages, and errors that name row and field."""

import pytest

from research.data import formats
from research.data.rows import RowError


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def test_alpaca():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert formats.alpaca(row) == [turn("user", "Add.\n\n1 2"), turn("assistant", "3")]
    row = {"instruction": "Hi", "input": None, "output": "", "system": "S", "history": [["a", "b"]]}
    assert formats.alpaca(row) == [
        turn("system", "S"),
        turn("user", "a"),
        turn("assistant", "b"),
        turn("user", "Hi"),
        turn("assistant", ""),
    ]


def test_sharegpt():
    talk = [("human", "q"), ("function_call", "f()"), ("observation", "1"), ("gpt", "one")]
    row = {"conversations": [{"from": f, "value": v} for f, v in talk], "tools": '[{"name": "f"}]'}
    found = formats.sharegpt(row)
    assert [m["role"] for m in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert [m["content"] for m in found[1:]] == ["q", "f()", "1", "one"]
    assert '{"name": "f"}' in found[0]["content"]
    row = {"conversations": [{"from": "human", "value": "q"}], "tools": "[]"}
    assert formats.sharegpt(row) == [turn("user", "q")]


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    row = {
        "messages": [turn("user", parts, loss_weight=0.0), turn("assistant", "c", loss_weight=0.5)]
    }
    assert formats.messages(row) == [turn("user", "ab"), turn("assistant", "c", loss_weight=0.5)]


def test_formats_are_recognised():
    rows = [
        ("f:1", {"instruction": "a", "output": "b", "messages": None}),
        ("f:2", {"conversations": [{"from": "human", "value": "a"}]}),
        ("f:3", {"messages": [turn("user", "a")]}),
    ]
    assert [(p, m[0]["content"]) for p, m in formats.conversations(rows)] == [
        ("f:1", "a"),
        ("f:2", "a"),
        ("f:3", "a"),
    ]
    with pytest.raises(RowError, match=r"f:4: no known format.*got \['text'\]"):
        list(formats.conversations([("f:4", {"text": "a"})]))


GPT = {"from": "gpt", "value": "x"}


@pytest.mark.parametrize(
    ("convert", "row", "message"),
    [
        (formats.alpaca, {"instruction": "a"}, "f:7: lacks field 'output'"),
        (
            formats.alpaca,
            {"instruction": "a", "output": 3},
            "f:7: field 'output' must be text, got int",
        ),
        (
            formats.alpaca,
            {"instruction": "a", "output": "b", "answer": "c"},
            "unknown field 'answer'",
        ),
        (formats.alpaca, ["a"], "f:7: expected an object, got list"),
        (formats.sharegpt, {"conversations": []}, "'conversations' must be a list of at least one"),
        (
            formats.sharegpt,
            {"conversations": [GPT, {"from": "robot", "value": "x"}]},
            r"f:7: conversations\[1\]: unknown role 'robot'",
        ),
        (formats.sharegpt, {"conversations": [{"from": "gpt"}]}, r"\[0\]: lacks field 'value'"),
        (formats.sharegpt, {"conversations": [GPT], "images": ["a.jpg"]}, "unknown field 'images'"),
        (formats.messages, {"messages": [turn("bot", "x")]}, r"messages\[0\]: unknown role 'bot'"),
        (formats.messages, {"messages": [turn("user", "x", loss_weight=1)]}, "on role 'user'"),
        (formats.messages, {"messages": [turn("assistant", "x", loss_weight=-1)]}, "number >= 0"),
        (formats.messages, {"messages": [turn("user", [{"type": "image"}])]}, "not text"),
    ],
)
def test_errors_name_row_and_field(convert, row, message):
    with pytest.raises(RowError, match=message):
        convert(row, "f:7")
