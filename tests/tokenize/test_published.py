"""Published vocabularies: the ids of transformers and of SentencePiece's own library."""

from itertools import pairwise

import pytest
import sentencepiece
from real_lines import three_languages
from sentencepiece import sentencepiece_model_pb2

from research.hub.gguf import metadata_of, read_header
from research.tokenize import published, spm
from research.tokenize.tokenizer import Tokenizer, TokenizerError


def test_first_words():
    assert published.gpt2().encode("Hello world!") == [15496, 995, 0]
    assert published.llama2().encode("Hello") == [15043]
    assert published.llama2().id_to_token(15043) == "▁Hello"
    assert published.llama2().encode("Hello", add_special=True) == [1, 15043]


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("gpt-2", published.gpt2),
        ("llama-spm", published.llama2),
        ("llama-bpe", published.llama3),
        ("qwen2", published.qwen),
    ],
)
def test_ids_are_those_of_transformers(name, load):
    """Recorded with each vocabulary: runs of spaces, digits, emoji, Khmer, Chinese, apostrophes."""
    pairs = published.expected(name)
    assert len(pairs) == 46
    assert [load().encode(text) for text, _ in pairs] == [ids for _, ids in pairs]


def llama_proto():
    """LLaMA's pieces and scores as a SentencePiece model, so that its own library can encode."""
    path = published.vocabulary_file("llama-spm")
    metadata = metadata_of(path, read_header(path))
    keys = ("tokens", "scores", "token_type")
    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, type_ in zip(
        *(metadata(f"tokenizer.ggml.{key}") for key in keys), strict=True
    ):
        model.pieces.add(piece=piece, score=score, type=type_)
    model.trainer_spec.model_type = spm.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def test_llama_and_its_twin_in_sentencepiece():
    theirs = sentencepiece.SentencePieceProcessor(model_proto=llama_proto())
    lines = three_languages()
    assert len(lines) >= 350
    for line in lines:
        ids = published.llama2().encode(line)
        assert ids == theirs.encode(line)
        assert published.llama2().decode(ids) == line


def test_a_tokenizer_model_and_its_twin():
    """Mistral's own tokenizer.model, opened by both libraries."""
    ours = published.mistral()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=ours.sentencepiece)
    lines = three_languages()
    assert len(lines) >= 350
    for line in lines:
        assert ours.encode(line) == theirs.encode(line)
        assert ours.decode(ours.encode(line)) == line
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id) == (1, 2, 0, None)
    assert ours.encode("Hello") == [22557]  # another vocabulary than LLaMA's


def test_the_twin_is_written_and_read_again(tmp_path):
    published.mistral().save(tmp_path)
    twin = Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    model = Tokenizer.from_directory(tmp_path)
    for line in three_languages()[:30]:
        assert twin.encode(line) == model.encode(line) == published.mistral().encode(line)


def test_offsets_of_real_lines():
    for line in three_languages()[:30]:
        ids, offsets = published.llama2().encode_with_offsets(line)
        assert ids == published.llama2().encode(line)
        assert all(end >= start for (_, end), (start, _) in pairwise(offsets))


def test_ids_that_are_not_there(tmp_path):
    message = "token id {} is outside the vocabulary of 50257 tokens"
    for token_id in (50257, -1):
        with pytest.raises(TokenizerError, match=message.format(token_id)):
            published.gpt2().decode([15496, token_id])
    with pytest.raises(
        TokenizerError, match=r"token '<\|im_end\|>' is not in the vocabulary of 50257"
    ):
        published.gpt2().id_of("<|im_end|>")
    assert published.gpt2().id_of("<|endoftext|>") == 50256
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: there is no such file"):
        Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01")
    with pytest.raises(spm.SentencePieceError, match=r"tokenizer\.model is not a SentencePiece"):
        Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")
