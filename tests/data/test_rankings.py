"""Orders, scored answers and options: layouts, pairs, rows, what is refused."""

import numpy as np
import pytest
from characters import encode

from research.data import corpora, rankings
from research.data.preferences import Preference, overlap, pair_rows, pairs
from research.data.rankings import Ranking, Scored
from research.data.rows import RowError

USER = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize("prompt", ["2+2?", USER])
def test_layouts(prompt):
    assert rankings.ranking({"prompt": prompt, "answers": ["4", "5"]}) == Ranking(USER, ("4", "5"))
    row = {"prompt": prompt, "answer": "4", "score": 2}
    assert rankings.scored(row) == Scored(USER, "4", 2.0)


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (rankings.ranking, {"answers": ["a", "b"]}, "f:3: expected .* 'prompt' and 'answers'"),
        (rankings.ranking, {"prompt": "a", "answers": ["b"]}, "f:3: field 'answers' must be a list"),
        (rankings.ranking, {"prompt": "a", "answers": "bc"}, "f:3: field 'answers' must be a list"),
        (rankings.ranking, {"prompt": "a", "answers": ["b", 1]}, r"answers\[1\] must be text, got int"),
        (rankings.ranking, {"prompt": "a", "answers": ["b", "c", "b"]}, r"answers\[2\] is answers\[0\]"),
        (rankings.ranking, {"prompt": [{"role": "x"}], "answers": ["b", "c"]}, "f:3: prompt"),
        (rankings.scored, "text", "expected an object with the fields 'prompt' and 'answer'"),
        (rankings.scored, {"prompt": "a", "answer": 1, "score": 1}, "field 'answer' must be text"),
        (rankings.scored, {"prompt": "a", "answer": "b"}, "'score' must be a finite number, got None"),
        (rankings.scored, {"prompt": "a", "answer": "b", "score": True}, "got True"),
        (rankings.scored, {"prompt": "a", "answer": "b", "score": float("nan")}, "got nan"),
    ],
)  # fmt: skip
def test_bad_rows(read, row, message):
    with pytest.raises(RowError, match=message):
        read(row, "f:3")


def test_an_order_is_all_of_its_pairs():
    found = rankings.ranking_pairs(Ranking(USER, ("a", "b", "c")))
    assert [(p.chosen, p.rejected) for p in found] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_scores_become_pairs_where_they_differ_enough():
    other = [{"role": "user", "content": "3+3?"}]
    rows = [
        ("r0", Scored(USER, "a", 1.0)),
        ("r1", Scored(other, "x", 9.0)),
        ("r2", Scored(USER, "b", 3.0)),
        ("r3", Scored(USER, "c", 1.5)),
    ]
    found = rankings.scored_pairs(rows, 1.0)
    assert found == [
        ("r2 over r0", Preference(USER, "b", "a")),
        ("r2 over r3", Preference(USER, "b", "c")),
    ]
    assert len(rankings.scored_pairs(rows, 0.5)) == 3
    with pytest.raises(ValueError, match="no two answers to one prompt differ by 5"):
        rankings.scored_pairs(rows, 5)
    with pytest.raises(ValueError, match="must be above 0, not 0"):
        rankings.scored_pairs(rows, 0)


def test_options_become_pairs():
    question = corpora.Question("Which?", ("no", "yes", "no"), 1)
    found = rankings.choice_pairs(question)
    assert [(p.chosen, p.rejected) for p in found] == [("yes", "no")] * 2


@pytest.mark.data
def test_pairs_of_a_real_exam_and_their_leaks():
    questions = corpora.multiple_choice("quartz")[:40]
    found = [pair for question in questions for pair in rankings.choice_pairs(question)]
    told = rankings.statistics(found)
    assert told.pairs == len(found) >= 40 and told.prompts <= 40 and not told.identical
    assert overlap(found[:20], found[19:]) and not overlap(found[:5], found[30:])


def test_rows_of_two_are_rows_of_pairs():
    both = [("a", Ranking(USER, ("four", "no"))), ("b", Ranking(USER, ("4", "five")))]
    found, counts = rankings.orders(both, encode, 40)
    assert (counts.read, counts.kept, counts.truncated) == (2, 2, 0)
    as_pairs, _ = pairs([(p, Preference(r.prompt, *r.answers)) for p, r in both], encode, 40)
    for name, values in pair_rows(as_pairs, 30).items():
        np.testing.assert_array_equal(rankings.order_rows(found, 30)[name], values)


def test_what_is_left_out_is_counted():
    long = [{"role": "user", "content": "x" * 30}]
    rows = [
        ("empty", Ranking(USER, ("a", " ", "b"))),
        ("long prompt", Ranking(long, ("a", "b", "c"))),
        ("long answer", Ranking(USER, ("y" * 30, "b", "c"))),
    ]
    found, counts = rankings.orders(rows, encode, 16)
    assert (counts.read, counts.kept, counts.empty) == (3, 1, 1)
    assert (counts.long_prompt, counts.truncated) == (1, 1)
    table = rankings.order_rows(found, 32)
    assert table["segment_ids"].max() == 3
    with pytest.raises(ValueError, match="order 0 has 30 tokens, more than the row's 29"):
        rankings.order_rows(found, 29)
    with pytest.raises(ValueError, match=r"orders have \[2, 3\] answers"):
        rankings.order_rows([found[0], found[0][:2]], 99)
    with pytest.raises(ValueError, match="no order of answers remains: OrderCounts"):
        rankings.orders(rows[:1], encode, 16)

    def refuse(messages):
        raise ValueError("no system messages")

    with pytest.raises(ValueError, match="line 7: no system messages"):
        rankings.orders([("line 7", Ranking(USER, ("a", "b")))], refuse, 16)


def test_statistics_by_hand():
    told = rankings.statistics([Preference(USER, "abcd", "a"), Preference(USER, "b", "b")])
    assert (told.pairs, told.prompts, told.identical) == (2, 1, 1)
    assert (told.chosen_characters, told.rejected_characters, told.chosen_longer) == (2.5, 1, 0.75)
    with pytest.raises(ValueError, match="no pairs"):
        rankings.statistics([])
