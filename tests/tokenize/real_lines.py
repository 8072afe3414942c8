"""Real lines in three languages, for tests."""

from functools import cache

from research.data import corpora


@cache
def three_languages(each: int = 400) -> list[str]:
    """`each` lines in English, in Spanish and in Chinese, taking turns."""
    verses = corpora.verses()[: 10 * each : 10]
    outputs = [row["output"] for _, row in corpora.alpaca_zh()]
    chinese = [line for text in outputs for line in text.splitlines() if line.strip()][:each]
    rows = zip(verses, chinese, strict=True)
    return [line for verse, zh in rows for line in (verse.english, verse.spanish, zh)]
