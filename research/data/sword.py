"""Bible texts of the SWORD project's `zText` modules, verse by verse.

A module holds two testaments of three files each: `bzz`, blocks of text compressed with zlib;
`bzs`, each block's (offset, size, size of the text); `bzv`, each entry's (block, offset in its
text, size), little-endian. Entries are in the order of a versification, one for each verse and one
for each heading; the heading of a chapter names it, so no table of verses is needed here. The text
is OSIS markup.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from research.hub.download import Package, open_member

ROOT = "./usr/share/sword/modules/texts/ztext"
HEADING = re.compile(r'<(?:chapter|div) [^>]*osisID="([^"]+)" sID=')  # with eID it is an end
# Notes, editors' titles (a psalm's own is canonical), pilcrows, remains of another markup ("\\+nd*").
NOT_TEXT = re.compile(
    r"<note\b.*?</note>|<title(?![^>]*canonical).*?</title>|¶|\\\+?\w+\*?", re.DOTALL
)
ADDED = re.compile(r"</?transChange[^>]*>")


class Reference(NamedTuple):
    """Where a verse stands; `book` is OSIS's name of it, "Gen" for Genesis."""

    book: str
    chapter: int
    verse: int


def verses(package: Package, module: str) -> dict[Reference, str]:
    """Every verse of a module that has text, in the order of the book."""
    found = {}
    for testament in ("ot", "nt"):
        read = {}
        for suffix in ("bzs", "bzv", "bzz"):
            with open_member(package, f"{ROOT}/{module}/{testament}.{suffix}") as file:
                read[suffix] = file.read()
        found |= numbered(entries(read["bzs"], read["bzv"], read["bzz"]))
    return found


def entries(bzs: bytes, bzv: bytes, bzz: bytes) -> Iterator[str]:
    """The markup of every entry of one testament."""
    blocks = [
        zlib.decompress(bzz[offset : offset + size]) if size else b""
        for offset, size, _ in struct.iter_unpack("<III", bzs)
    ]
    for block, offset, size in struct.iter_unpack("<IIH", bzv):
        yield blocks[block][offset : offset + size].decode() if size else ""


def numbered(markup: Iterator[str]) -> dict[Reference, str]:
    """Entries by reference: headings say the book or chapter that begins, verses are counted."""
    found: dict[Reference, str] = {}
    book, chapter, verse = "", 0, 0
    for entry in markup:
        heading = HEADING.search(entry)
        if heading:
            book, _, number = heading[1].partition(".")
            chapter, verse = int(number or 0), 0
        elif chapter:
            verse += 1
            if text := plain(entry):
                found[Reference(book, chapter, verse)] = text
    return found


def plain(markup: str) -> str:
    """The words of OSIS markup: no notes, no titles but a psalm's own, single spaces.

    Where a word that the translators added touches its neighbours, a space is put between them.
    """
    text = ADDED.sub("\0", NOT_TEXT.sub("", markup))
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    text = re.sub(r"(?<=[\w,;:.])\0+(?=\w)", " ", text).replace("\0", "")
    return " ".join(text.split())
