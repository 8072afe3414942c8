"""Tokens as a reader can tell them apart: whole words, and the parts that a character was cut into."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

from research.tokenize.tokenizer import Tokenizer, TokenizerError

SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """Line ends and tabs as signs, whatever else cannot be seen as U+XXXX; spaces stay."""

    def sign(character: str) -> str:
        if character in SIGNS:
            return SIGNS[character]
        unseen = unicodedata.category(character)[0] in "CZ" and character != " "
        return f"U+{ord(character):04X}" if unseen else character

    return "".join(map(sign, text))


def labels(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """One label a token, from its (start, end) in `text`.

    Tokens whose spans share a character, because each holds some of its bytes, are numbered:
    '伏 1/3', '伏 2/3', '伏 3/3'.
    """
    groups: list[list[tuple[int, int]]] = []
    for start, end in offsets:
        if groups and start < max(e for _, e in groups[-1]) and end > start:
            groups[-1].append((start, end))
        else:
            groups.append([(start, end)])
    return list(itertools.chain.from_iterable(_label(text, group) for group in groups))


def _label(text: str, group: list[tuple[int, int]]) -> list[str]:
    shown = [visible(text[start:end]) for start, end in group]
    if len(group) == 1:
        return shown
    return [f"{label} {n}/{len(group)}" for n, label in enumerate(shown, 1)]


def encode_with_labels(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[str]]:
    """(ids, labels) of `text` with the special tokens that the tokenizer adds (bos, say)."""
    ids = tokenizer.encode(text, add_special=True)
    plain, offsets = tokenizer.encode_with_offsets(text)
    for before in range(len(ids) - len(plain) + 1):
        after = before + len(plain)
        if ids[before:after] == plain:
            added = [tokenizer.id_to_token(i) for i in ids]
            return ids, [*added[:before], *labels(text, offsets), *added[after:]]
    raise TokenizerError("the tokenizer's special tokens are not added around the text")
