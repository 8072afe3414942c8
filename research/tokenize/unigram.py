"""The Unigram model's encoder from scratch, to be read (Kudo 2018, arXiv:1804.10959).

A text may be cut into pieces in many ways; the probability of one is the product of those of its
pieces. Viterbi finds the best: best[end] = max over pieces ending at `end` of
best[start] + log p(piece). SentencePiece does the same in float32, whose rounding may choose
otherwise between two cuts of equal score (a run of spaces).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

UNKNOWN_PENALTY = 10.0  # below the least probable piece, as in SentencePiece


def segment(text: str, scores: Mapping[str, float]) -> list[str]:
    """The most probable cut of `text` into pieces of `scores` (log-probabilities).

    `text` is normalized already, its spaces written ▁. A character that no piece holds stands alone,
    scored UNKNOWN_PENALTY below the lowest score. Of two equally probable cuts, the one whose last
    piece is the longer is kept.
    """
    unknown = min(scores.values()) - UNKNOWN_PENALTY
    longest = max(map(len, scores))
    best = [0.0] + [-math.inf] * len(text)
    start_of = [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - longest), end):
            score = scores.get(text[start:end], unknown if end == start + 1 else -math.inf)
            if best[start] + score > best[end]:  # the earliest start comes first and wins ties
                best[end], start_of[end] = best[start] + score, start
    pieces, end = [], len(text)
    while end > 0:
        pieces.append(text[start_of[end] : end])
        end = start_of[end]
    return pieces[::-1]


def with_bytes(pieces: list[str], scores: Mapping[str, float]) -> list[str]:
    """Byte fallback: each character that is no piece as the names of its UTF-8 bytes, <0xE4> say."""
    return [
        name
        for piece in pieces
        for name in (
            [piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode("utf-8")]
        )
    ]
