"""A synthetic probe of instruction following: instructions whose answers a rule can check.

    found = probe.shares(sft.answer(pretrained, [item.prompt for item in probe.ITEMS], 64))
    found["en"], found["zh"]      # the part of the instructions that were followed

The idea is that of IFEval (Zhou et al. 2023, arXiv:2311.07911): no judge, only rules about form.
The 24 instructions, 16 in English and 8 in Chinese, are made up here and ask for easy things, so the
numbers compare models with each other and with nothing else. A rule sees the answer without the
white space around it; that an answer is also true, or of any use, is not asked, and a list counts
whatever marks its items, a hyphen or a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from research.evaluate.choice import Proportion

Check = Callable[[str], bool]

CJK = re.compile("[\u4e00-\u9fff]")
LATIN = re.compile("[A-Za-z]")
MARK = re.compile(r"(-|\*|•|\d+[.)、:：])\s*\S")  # what begins an item of a list
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


class Item(NamedTuple):
    """An instruction, the language it is in, and the rule its answer must pass."""

    language: str
    prompt: str
    check: Check


def has_words(count: int, text: str) -> bool:
    """Exactly `count` runs of characters between white space."""
    return len(text.split()) == count


def has_items(count: int, text: str) -> bool:
    """A list of exactly `count` lines that begin as items do; other lines may stand around it."""
    return sum(MARK.match(line.strip()) is not None for line in text.splitlines()) == count


def has_commas(count: int, text: str) -> bool:
    """One line of exactly `count` parts between commas, of at most two words each."""
    parts = [part.split() for part in text.strip().rstrip(".").split(",")]
    return "\n" not in text.strip() and len(parts) == count and all(0 < len(p) < 3 for p in parts)


def is_upper(text: str) -> bool:
    """Letters, none of them small."""
    return text.isupper()


def is_lower(text: str) -> bool:
    """Letters, none of them a capital."""
    return text.islower()


def is_json(keys: tuple[str, ...], text: str) -> bool:
    """One JSON object with these keys and no others, bare or in a fence."""
    fenced = FENCE.fullmatch(text.strip())
    try:
        found = json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == set(keys)


def is_one_of(options: tuple[str, ...], text: str) -> bool:
    """One of the options and nothing else but a stop after it; capitals do not count."""
    return text.strip().rstrip(".。!！").lower() in options


def is_digits(text: str) -> bool:
    """A number in digits and nothing else but a stop after it."""
    return re.fullmatch(r"\d+[.。]?", text.strip()) is not None


def begins(start: str, text: str) -> bool:
    return text.strip().startswith(start)


def ends(end: str, text: str) -> bool:
    """A stop may follow."""
    return text.strip().rstrip(".。!！\"'”").endswith(end)


def contains(words: tuple[str, ...], text: str) -> bool:
    """Every one of the words; capitals do not count."""
    return all(word in text.lower() for word in words)


def is_short(count: int, text: str) -> bool:
    """Chinese of at most `count` characters, signs included."""
    return is_chinese(text) and len("".join(text.split())) <= count


def is_chinese(text: str) -> bool:
    """More Chinese characters than Latin letters."""
    return len(CJK.findall(text)) > len(LATIN.findall(text))


def is_english(text: str) -> bool:
    """Latin letters, and not one Chinese character."""
    return bool(LATIN.search(text)) and not CJK.search(text)


_en, _zh = partial(Item, "en"), partial(Item, "zh")
ITEMS = (
    _en("Name the capital of Italy. Answer with exactly one word.", partial(has_words, 1)),
    _en("Describe the sea in exactly three words.", partial(has_words, 3)),
    _en("List five fruits, each on a line that begins with a hyphen.", partial(has_items, 5)),
    _en("List three animals that can fly, as a numbered list.", partial(has_items, 3)),
    _en("Name four colours, separated by commas, and write nothing else.", partial(has_commas, 4)),
    _en("Write one sentence about winter in upper case letters only.", is_upper),
    _en("Write one sentence about rain in lower case, without any capital letter.", is_lower),
    _en(
        'Describe a person as a JSON object with the keys "name" and "age". Give only the JSON.',
        partial(is_json, ("name", "age")),
    ),
    _en(
        'Give a JSON object with the keys "city" and "country" for Paris, and no other text.',
        partial(is_json, ("city", "country")),
    ),
    _en(
        "Is the sun larger than the moon? Answer with yes or no only.",
        partial(is_one_of, ("yes", "no")),
    ),
    _en("Is ice hot? Answer with one word: yes or no.", partial(is_one_of, ("yes", "no"))),
    _en("What is seven plus five? Answer with the number in digits only.", is_digits),
    _en(
        'Say in one sentence why leaves are green. The last word must be "Done".',
        partial(ends, "Done"),
    ),
    _en('Write two sentences about dogs. Begin with the word "Today".', partial(begins, "Today")),
    _en(
        'Write a sentence about bread with the words "oven" and "morning".',
        partial(contains, ("oven", "morning")),
    ),
    _en('Translate "good morning" into Chinese characters.', is_chinese),
    _zh("请用中文介绍一下春天。", is_chinese),
    _zh("请列出三种水果，每行一种，用数字编号。", partial(has_items, 3)),
    _zh("太阳比月亮大吗？只回答“是”或“不是”。", partial(is_one_of, ("是", "不是"))),
    _zh("请用英文回答：天空是什么颜色？", is_english),
    _zh("中国的首都是哪里？请用不超过十个字回答。", partial(is_short, 10)),
    _zh(
        "请给出一个 JSON 对象，键为 name 和 age，不要写其他内容。",
        partial(is_json, ("name", "age")),
    ),
    _zh("请写一句话，以“今天”开头。", partial(begins, "今天")),
    _zh("七加五等于几？只用数字回答。", is_digits),
)


def followed(answers: Sequence[str]) -> list[bool]:
    """Whether each answer, one for each of ITEMS, passes its rule; an empty one never does."""
    pairs = zip(ITEMS, answers, strict=True)
    return [bool(text.strip()) and item.check(text.strip()) for item, text in pairs]


def shares(answers: Sequence[str]) -> dict[str, Proportion]:
    """By language, how many of its instructions were followed."""
    passed = followed(answers)
    kept = {
        language: [ok for item, ok in zip(ITEMS, passed, strict=True) if item.language == language]
        for language in ("en", "zh")
    }
    return {language: Proportion(sum(oks), len(oks)) for language, oks in kept.items()}
