"""Labels of tokens: every one can be seen, and parts of a character are told apart."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from research.tokenize.labels import encode_with_labels, labels, visible
from research.tokenize.tokenizer import Tokenizer, TokenizerError


def byte_tokenizer(*merges):
    """Byte-level BPE of the 256 bytes, these merges, and a bos token <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *("".join(pair) for pair in merges), "<s>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, bos_id=backend.token_to_id("<s>"))


def test_bytes_of_one_character_are_numbered():
    ids, found = encode_with_labels(byte_tokenizer(("Ġ", "a")), "x a伏é")
    assert len(ids) == 7
    assert found == ["x", " a", "伏 1/3", "伏 2/3", "伏 3/3", "é 1/2", "é 2/2"]


def test_a_token_that_holds_the_end_of_one_character_and_the_beginning_of_another():
    # 伏 is E4 BC 8F and é C3 A9; a merge joins 8F and C3.
    assert labels("伏é", [(0, 1), (0, 2), (1, 2)]) == ["伏 1/3", "伏é 2/3", "é 3/3"]
    assert labels("ab", [(0, 1), (1, 2)]) == ["a", "b"]


def test_the_special_tokens_that_a_tokenizer_adds_have_their_names():
    tokenizer = byte_tokenizer()
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A", "<s>"], special_tokens=[("<s>", tokenizer.bos_id)]
    )
    ids, found = encode_with_labels(tokenizer, "hé")
    assert ids[0] == ids[-1] == tokenizer.bos_id
    assert found == ["<s>", "h", "é 1/2", "é 2/2", "<s>"]


def test_special_tokens_within_the_text_are_refused():
    tokenizer = byte_tokenizer()

    class Mixing:
        encode = staticmethod(lambda text, add_special: [1, 9, 2])
        encode_with_offsets = staticmethod(tokenizer.encode_with_offsets)

    with pytest.raises(TokenizerError, match="not added around the text"):
        encode_with_labels(Mixing(), "ab")


def test_what_cannot_be_seen_has_a_sign():
    assert visible(" a\n\tb\r") == " a⏎⇥b␍"
    assert visible("\u202e\u00a0\x00é伏") == "U+202EU+00A0U+0000é伏"
