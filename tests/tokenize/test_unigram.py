"""Viterbi over pieces: every cut tried, and SentencePiece's own ids on lines in three languages."""

import itertools
import math

import pytest
import sentencepiece
from real_lines import three_languages

from research.tokenize import spm, unigram
from research.tokenize.train import train_sentencepiece

SCORES = {"a": -1.0, "b": -1.2, "ab": -2.5, "ba": -2.0, "aba": -3.3, "c": -4.0}


def every_cut(text):
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(text)]
        yield [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def score(pieces):
    unknown = min(SCORES.values()) - unigram.UNKNOWN_PENALTY
    return sum(SCORES.get(p, unknown if len(p) == 1 else -math.inf) for p in pieces)


@pytest.mark.parametrize("text", ["a", "abab", "ababcab", "bbaax", "xyabax"])
def test_no_cut_is_more_probable(text):
    pieces = unigram.segment(text, SCORES)
    assert "".join(pieces) == text
    assert score(pieces) == pytest.approx(max(score(cut) for cut in every_cut(text)))


def test_ids_of_sentencepiece():
    # A run of spaces can be cut in two ways of equal score, which rounding tells apart.
    lines = [line for line in three_languages(140) if "  " not in line]
    assert len(lines) > 350
    proto = train_sentencepiece(lines[::2], 1800).sentencepiece
    model = spm.parse(proto)
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == spm.NORMAL}
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    fallback = 0
    for line in lines[1::2]:
        pieces = unigram.segment("▁" + line.replace(" ", "▁"), scores)
        names = unigram.with_bytes(pieces, scores)
        fallback += names != pieces
        assert [ids[name] for name in names] == theirs.encode(line), line
    assert fallback > 0  # characters that were not in the training half


def test_nothing_is_nothing():
    assert unigram.segment("", SCORES) == []
    assert unigram.with_bytes(["a", "你"], SCORES) == ["a", "<0xE4>", "<0xBD>", "<0xA0>"]
