"""SWORD modules: a testament made by hand, and the two real ones."""

import struct
import zlib

import pytest

from research.data import corpora, sword
from research.data.sword import Reference

BOOKS = [
    [
        '<div canonical="true" osisID="Gen" sID="g" type="book"/><title>The Book</title>',
        '<chapter n="1" osisID="Gen.1" sID="Gen.1"/>',
        'In the <w lemma="x">beginning</w>.',
        "",
        'Third.<note placement="foot">not <i>this</i></note> <chapter eID="Gen.1"/>',
        '<chapter n="2" osisID="Gen.2" sID="Gen.2"/>',
        'Fin &amp; out <div canonical="true" eID="g" osisID="Gen" type="book"/>',
    ],
    [
        '<div canonical="true" osisID="Exod" sID="e" type="book"/>',
        '<chapter n="1" osisID="Exod.1" sID="Exod.1"/>',
        "¶ Éxodo",
    ],
]


def written(books):
    """(bzs, bzv, bzz) of one testament, with the empty entry that begins a module."""
    bzs, bzv, bzz = b"", struct.pack("<IIH", 0, 0, 0), b""
    for number, book in enumerate(books):
        text = b""
        for entry in book:
            bzv += struct.pack("<IIH", number, len(text), len(entry.encode()))
            text += entry.encode()
        packed = zlib.compress(text)
        bzs += struct.pack("<III", len(bzz), len(packed), len(text))
        bzz += packed
    return bzs, bzv, bzz


def test_verses_are_counted_within_the_chapters_that_headings_name():
    assert sword.numbered(sword.entries(*written(BOOKS))) == {
        Reference("Gen", 1, 1): "In the beginning.",
        Reference("Gen", 1, 3): "Third.",
        Reference("Gen", 2, 1): "Fin & out",
        Reference("Exod", 1, 1): "Éxodo",
    }


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<w>alas</w><transChange type='added'>traerá</transChange><w>salud</w>:", None),
        ("alas <transChange>traerá</transChange> salud:", None),
        ('<title canonical="true" type="psalm">A <w>Psalm</w>.</title> Lord', "A Psalm. Lord"),
        ("<title>Heading</title>a<lb/>  b\n", "a b"),
        ("the LORD\\+nd* of hosts", "the LORD of hosts"),
        ("God’<w>s</w>, <transChange>was</transChange>;", "God’s, was;"),
    ],
)
def test_plain(markup, text):
    assert sword.plain(markup) == (text or "alas traerá salud:")


@pytest.mark.data
def test_the_two_bibles_are_aligned():
    found = {verse.reference: verse for verse in corpora.verses()}
    assert len(found) == 31_084
    assert len({reference.book for reference in found}) == 66
    first, last = found[Reference("Gen", 1, 1)], found[Reference("Rev", 22, 21)]
    assert first.english == "In the beginning God created the heaven and the earth."
    assert first.spanish == "EN el principio crió Dios los cielos y la tierra."
    assert last.english.endswith("Christ be with you all. Amen.")
    assert last.spanish == "La gracia de nuestro Señor Jesucristo sea con todos vosotros. Amén."
    assert not [v for v in found.values() if set("<>&\\\0¶") & set(v.english + v.spanish)]
