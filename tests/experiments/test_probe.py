"""The rules of the synthetic probe, each with answers that follow it and answers that do not."""

import pytest

from experiments.shared import probe
from experiments.shared.samples import cell, side_by_side

# By the prompt's first words: answers that follow the instruction, and answers that do not.
ANSWERS = {
    "Name the capital": (["Rome", "Rome."], ["It is Rome.", "New York"]),
    "Describe the sea": (["Blue, deep, wide."], ["Blue and deep and wide", "Blue"]),
    "List five fruits": (
        ["- a\n- b\n- c\n- d\n- e", "Here:\n- a\n- b\n- c\n- d\n- e\nDone."],
        ["- a\n- b\n- c\n- d", "a, b, c, d, e", "- a\n-\n- c\n- d\n- e"],
    ),
    "List three animals": (["1. bat\n2. owl\n3. bee", "1) a\n2) b\n3) c"], ["1. bat\n2. owl"]),
    "Name four colours": (
        ["red, blue, green, dark red", "red, blue, pink, grey."],
        ["red, blue, green", "They are red, blue, green, pink", "red, blue,\ngreen, pink"],
    ),
    "Write one sentence about winter": (["IT IS COLD, 0 DEGREES."], ["It is cold.", "123"]),
    "Write one sentence about rain": (["rain falls."], ["Rain falls.", "..."]),
    "Describe a person": (
        ['{"name": "A", "age": 3}', '```json\n{"age": 3, "name": "A"}\n```'],
        ['{"name": "A"}', 'Here: {"name": "A", "age": 3}', "name, age", "[1]"],
    ),
    "Give a JSON object": (
        ['{"city": "Paris", "country": "France"}'],
        ['{"city": "Paris", "country": "France", "river": "Seine"}'],
    ),
    "Is the sun": (["Yes.", "no"], ["Yes, it is.", "maybe"]),
    "Is ice hot": (["No"], ["Ice is not hot.", "No, no"]),
    "What is seven": (["12", "12.", "13"], ["twelve", "7 + 5 = 12", "12.5"]),
    "Say in one": (["Green is reflected. Done.", "Done"], ["Done is done, friend"]),
    "Write two sentences": (["Today dogs run."], ["Dogs run today."]),
    "Write a sentence about bread": (
        ["In the morning the Oven is hot."],
        ["The oven is hot.", "A morning."],
    ),
    "Translate": (["早上好", "早上好 (hi)"], ["good morning", "zǎo shàng hǎo 好"]),
    "请用中文": (["春天来了。"], ["Spring is here."]),
    "请列出三种": (["1. 苹果\n2. 梨\n3. 桃", "1、苹果\n2、梨\n3、桃"], ["苹果，梨，桃"]),
    "太阳比": (["是", "是。", "不是"], ["太阳比月亮大。", "yes"]),
    "请用英文": (["The sky is blue."], ["天空是蓝色的。", "Blue (蓝)", "12"]),
    "中国的首都": (["北京", "中国的首都是北京。"], ["中国的首都是历史悠久的北京。", "Beijing"]),
    "请给出": (['{"name": "王", "age": 3}'], ['对象：{"name": "王", "age": 3}']),
    "请写一句话": (["今天下雨。"], ["我今天去学校。"]),
    "七加五": (["12", "12。"], ["十二", "等于12"]),
}


def named(start):
    (found,) = (
        item
        for item in probe.ITEMS
        if item.prompt.startswith(start + " ") or item.prompt.startswith(start)
    )
    return found


@pytest.mark.parametrize("start", ANSWERS)
def test_a_rule_tells_what_follows_it_from_what_does_not(start):
    follows, fails = ANSWERS[start]
    check = named(start).check
    assert all(check(text) is True for text in follows)
    assert not any(check(text) for text in fails)


def test_every_instruction_is_tried_and_none_is_there_twice():
    assert len(probe.ITEMS) == len(ANSWERS) == len({item.prompt for item in probe.ITEMS}) == 24
    assert [item.language for item in probe.ITEMS] == ["en"] * 16 + ["zh"] * 8


def test_shares_count_by_language_and_an_empty_answer_follows_nothing():
    good = [ANSWERS[start][0][0] for start in ANSWERS]
    found = probe.shares(good)
    assert (found["en"].correct, found["en"].total) == (16, 16)
    assert (found["zh"].correct, found["zh"].total) == (8, 8)
    assert not any(probe.followed([" \n"] * 24))
    found = probe.shares([f"\n{text} " for text in good[:4]] + [""] * 12 + good[16:17] + [""] * 7)
    assert (found["en"].correct, found["zh"].correct) == (4, 1)
    with pytest.raises(ValueError):
        probe.followed(good[:5])


def test_samples_keep_whatever_a_model_says_inside_its_cell():
    assert cell("a | b\n<b>c</b> &amp;") == "a &#124; b<br>&lt;b>c&lt;/b> &amp;amp;"
    assert cell(" \n ") == "(nothing)"
    text = side_by_side(
        ["p", "q"],
        {"before": ["1", "2"], "after": ["3", "4\n5"]},
        {"before": ["x", "y"], "after": ["y", "x"]},
    )
    assert text.splitlines()[:5] == [
        "**p**",
        "",
        "| model |  | answer |",
        "| --- | --- | --- |",
        "| before | x | 1 |",
    ]
    assert text.splitlines()[-1] == "| after | x | 4<br>5 |"
