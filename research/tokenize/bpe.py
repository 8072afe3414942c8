"""Byte-level BPE from scratch, to be read (train.py does the same with `tokenizers`, and faster).

Sennrich et al. 2016 (arXiv:1508.07909): start from single symbols and merge the commonest pair of
neighbours, again and again; the list of merges, in order, is the model. Radford et al. 2019 (GPT-2)
take bytes as the symbols, so that no text is unknown, and first split a text into words by a
pattern, so that no token crosses from one word to the next.

The ids are those of `tokenizers`: 256 single bytes, then one id a merge. Two pairs that are equally
common are told apart by their ids, the smaller first, so the result does not depend on the order of
the texts.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import regex

from research.tokenize.tokenizer import TokenizerError

# Contractions; a word, a number or punctuation with the space before it; the rest of the spaces,
# where the last one stays with the word that follows.
SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# GPT-2 writes each byte as one visible character and numbers those characters: the 188 bytes that
# are visible in Latin-1 keep their order, the other 68 come after them.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [*VISIBLE, *(byte for byte in range(256) if byte not in VISIBLE)]
ID_OF_BYTE = {byte: index for index, byte in enumerate(BYTES)}

Pair = tuple[int, int]


@dataclass(frozen=True)
class Bpe:
    """`tokens[id]` is the bytes of a token; `merges[pair]` the id that the pair becomes, in the
    order in which they were learned."""

    tokens: Sequence[bytes]
    merges: dict[Pair, int]
    ranks: dict[Pair, int] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "ranks", {pair: rank for rank, pair in enumerate(self.merges)})

    def encode(self, text: str) -> list[int]:
        words = split(text)
        known = {word: self.encode_word(word) for word in set(words)}
        return [index for word in words for index in known[word]]

    def encode_word(self, word: bytes) -> list[int]:
        """Merge the pair that was learned first, wherever it stands, until none is left.

        By rank, not by how common the pair is here: the text is cut as the training text was.
        """
        ids = [ID_OF_BYTE[byte] for byte in word]
        while len(ids) > 1:
            pair = min(pairwise(ids), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.merges:
                break
            ids = merge(ids, pair, self.merges[pair])
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes, exactly; a part of a text may end inside a character.

        TokenizerError when an id is outside the vocabulary.
        """
        for index in ids:
            if not 0 <= index < len(self.tokens):
                raise TokenizerError(
                    f"token id {index} is outside the vocabulary of {len(self.tokens)} tokens"
                )
        return b"".join(self.tokens[index] for index in ids)


def split(text: str) -> list[bytes]:
    """The words of a text in UTF-8; joined, they are the text."""
    return [word.encode() for word in SPLIT.findall(text)]


def merge(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """`ids` with `new` in the place of each `pair`, from the left: in a a a the first two merge."""
    merged, i = [], 0
    while i < len(ids):
        found = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
        merged.append(new if found else ids[i])
        i += 2 if found else 1
    return merged


def train(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Bpe:
    """A BPE of at most `vocab_size` tokens whose merged pairs stood in the texts `min_frequency`
    times or more when they were merged.

    A word counts as often as it occurs but is stored once. A merge only touches the words that hold
    its pair (`where`), and the commonest pair is the first of a heap. An entry of the heap may be
    out of date: then it is put back with the count of today.
    """
    if vocab_size < 256:
        raise TokenizerError(f"vocab_size {vocab_size} is less than the 256 bytes")
    frequency = Counter(word for text in texts for word in split(text))
    words = [[ID_OF_BYTE[byte] for byte in word] for word in frequency]
    times = list(frequency.values())
    counts, where = _pairs(words, times)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens, merges = [bytes([byte]) for byte in BYTES], {}
    ids = {token: index for index, token in enumerate(tokens)}
    while heap and len(tokens) < vocab_size:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if counts[pair] < min_frequency:
            break
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ids:  # "abc" may have come about before, as ab+c and now as a+bc
            ids[token] = len(tokens)
            tokens.append(token)
        new = merges[pair] = ids[token]
        for changed in _apply(pair, new, words, times, counts, where):
            heapq.heappush(heap, (-counts[changed], changed))
    return Bpe(tuple(tokens), merges)


def _pairs(words: list[list[int]], times: list[int]) -> tuple[Counter, dict[Pair, set[int]]]:
    """How often each pair of neighbours occurs, and in which words."""
    counts, where = Counter(), defaultdict(set)
    for number, (word, count) in enumerate(zip(words, times, strict=True)):
        for pair in pairwise(word):
            counts[pair] += count
            where[pair].add(number)
    return counts, where


def _apply(
    pair: Pair,
    new: int,
    words: list[list[int]],
    times: list[int],
    counts: Counter,
    where: dict[Pair, set[int]],
) -> set[Pair]:
    """Merge `pair` in every word that holds it; the pairs that came about."""
    changed = set()
    for number in where.pop(pair):
        for old in pairwise(words[number]):
            counts[old] -= times[number]
        words[number] = merge(words[number], pair, new)
        for now in pairwise(words[number]):
            counts[now] += times[number]
            if new in now:
                where[now].add(number)
                changed.add(now)
    return changed
