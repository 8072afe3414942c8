"""Byte-level BPE from scratch: the merges and ids of `tokenizers`, on a megabyte and on small texts."""

import json
import random

import pytest

from research.data import corpora
from research.tokenize import bpe
from research.tokenize.tokenizer import TokenizerError
from research.tokenize.train import train_bpe


def library(texts, vocab_size, **settings):
    """(tokenizer, merges as pairs of ids) of `tokenizers`."""
    trained = train_bpe(texts, vocab_size, special_tokens=(), eos=None, **settings)
    model = json.loads(trained.backend.to_str())["model"]
    ids = model["vocab"]
    return trained, [(ids[left], ids[right]) for left, right in model["merges"]]


def test_a_megabyte_of_real_text():
    text = corpora.wiki()
    assert len(text.encode()) > 1_000_000
    theirs, merges = library([text], 1500)
    ours = bpe.train([text], 1500)
    assert len(ours.tokens) == 1500 and list(ours.merges) == merges
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("seed", range(20))
def test_small_texts_full_of_ties(seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(40)]
    text, size = " ".join(words), 256 + rng.randint(1, 60)
    least = rng.randint(1, 3)
    theirs, merges = library([text], size, min_frequency=least)
    ours = bpe.train([text], size, min_frequency=least)
    assert list(ours.merges) == merges
    assert ours.encode(text) == theirs.encode(text)


def test_by_hand():
    """a b stands 3 times; then ␣ ab and ab c twice each, and ␣ has the smaller id."""
    ours = bpe.train(["abc abc ab xy"], 300)
    a, b, space = (bpe.ID_OF_BYTE[ord(letter)] for letter in "ab ")
    assert ours.merges == {(a, b): 256, (space, 256): 257}
    assert ours.tokens[256:] == (b"ab", b" ab")
    assert bpe.merge([a, a, a], (a, a), 256) == [256, a]
    assert bpe.split("I've  seen 12,\n") == [b"I", b"'ve", b" ", b" seen", b" 12", b",", b"\n"]


def test_the_order_of_texts_does_not_matter():
    texts = corpora.wiki()[:20_000].split("\n")
    assert bpe.train(texts, 400) == bpe.train(texts[::-1], 400)


def test_any_text_comes_back():
    ours = bpe.train(["the cat"], 260)
    for text in ["", " \n\t ", "ünïcode 你好 😀\x00\x7f", "".join(map(chr, range(0x3000)))]:
        assert ours.decode(ours.encode(text)).decode() == text
    assert ours.decode([bpe.ID_OF_BYTE[byte] for byte in range(256)]) == bytes(range(256))


def test_bad_input():
    with pytest.raises(
        TokenizerError, match="token id 256 is outside the vocabulary of 256 tokens"
    ):
        bpe.train([], 256).decode([256])
    with pytest.raises(TokenizerError, match="vocab_size 100 is less than the 256 bytes"):
        bpe.train(["a"], 100)
