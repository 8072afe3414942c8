"""Streaming text: the pieces add up, and half a character is never shown."""

from research.decode.text import TextStream


def decode(ids):
    return bytes(ids).decode(errors="replace")


def test_pieces_add_up_and_characters_are_whole():
    text = "naïve 北京 🙂!"
    stream, pieces = TextStream(decode), []
    for byte in text.encode():
        pieces.append(stream.add([byte]))
        assert "\ufffd" not in pieces[-1]
    assert "".join(pieces) == text and stream.end() == ""
    assert pieces[2:4] == ["", "ï"]


def test_what_never_becomes_a_character_is_shown_at_the_end():
    stream = TextStream(decode)
    assert stream.add([65, 0xE5]) == "A"
    assert stream.end() == "\ufffd"
