"""Training a tokenizer on a corpus: byte-level BPE, and SentencePiece (Unigram or BPE).

Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): every text is a sequence of bytes, so
nothing is unknown and decoding is exact. SentencePiece (Kudo & Richardson 2018): text with spaces
as ▁; with `byte_fallback` unknown characters become bytes, and nothing is unknown either.

Training is deterministic: the same texts and settings give the same ids.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from research.tokenize import spm
from research.tokenize.tokenizer import Tokenizer, TokenizerError

# The characters that byte pieces are named with, which must be pieces themselves: see spm.py.
BYTE_NAMES = "<0x123456789ABCDEF>"

Texts = Iterable[str] | Sequence[Path]


def texts_of(source: Texts) -> Iterator[str]:
    """The texts; a Path stands for the UTF-8 file it names, read in pieces of whole lines."""
    for entry in source:
        if isinstance(entry, Path):
            with entry.open(encoding="utf-8", newline="") as file:
                while lines := file.readlines(1 << 20):
                    yield "".join(lines)
        else:
            yield entry


def train_bpe(
    source: Texts,
    vocab_size: int,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    *,
    bos: str | None = None,
    eos: str | None = "<|endoftext|>",
    pad: str | None = None,
    chat_template: str | None = None,
    individual_digits: bool = False,
    min_frequency: int = 2,
) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids: special tokens, 256 bytes, then merges.

    `source` holds texts or Paths. `bos`, `eos` and `pad` name members of `special_tokens`.
    Raises TokenizerError when the vocabulary cannot hold the bytes, or the source has no text.
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise TokenizerError(f"vocab_size {vocab_size} is less than {smallest}: bytes and specials")
    backend = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if individual_digits else []
    split.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_not_empty(texts_of(source)), trainer)
    ids = _ids(backend, special_tokens, bos=bos, eos=eos, pad=pad)
    return Tokenizer(backend, **ids, chat_template=chat_template)


def train_sentencepiece(
    source: Texts,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    model_type: str = "unigram",
    byte_fallback: bool = True,
    normalization: str = "identity",
    add_dummy_prefix: bool = True,
    character_coverage: float = 0.9995,
    chat_template: str | None = None,
    eos: str = "</s>",
) -> Tokenizer:
    """A SentencePiece tokenizer of `vocab_size` ids: <unk> 0, <s> 1, </s> 2, specials, bytes, pieces.

    `model_type` is "unigram" or "bpe"; `normalization` one of SentencePiece's rules ("identity",
    which is exact, "nmt_nfkc", ...). With identity and byte_fallback decoding is exact, except that
    ▁ (U+2581) in a text comes back as a space, which is SentencePiece's own limit.
    """
    if model_type not in ("unigram", "bpe"):
        raise TokenizerError(f"model_type {model_type!r}; expected 'unigram' or 'bpe'")
    exact = normalization == "identity"
    written = io.BytesIO()
    lines = (line for text in texts_of(source) for line in text.splitlines())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_not_empty(lines),
            model_writer=written,
            model_type=model_type,
            vocab_size=vocab_size,
            control_symbols=list(special_tokens),
            byte_fallback=byte_fallback,
            required_chars=BYTE_NAMES if byte_fallback else "",
            character_coverage=character_coverage,
            normalization_rule_name=normalization,
            remove_extra_whitespaces=not exact,
            allow_whitespace_only_pieces=exact,
            add_dummy_prefix=add_dummy_prefix,
            split_digits=True,
            max_sentence_length=1 << 24,  # in bytes; longer ones it drops without a word
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"SentencePiece cannot train {vocab_size} pieces here: {error}"
        ) from error
    proto = written.getvalue()
    backend = spm.backend(spm.parse(proto))
    ids = _ids(backend, ("<s>", "</s>", "<unk>", *special_tokens), bos="<s>", eos=eos, unk="<unk>")
    return Tokenizer(backend, **ids, chat_template=chat_template, sentencepiece=proto)


def _not_empty(texts: Iterator[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise TokenizerError("no text to train a tokenizer on")


def _ids(backend: tokenizers.Tokenizer, special: Sequence[str], **named: str | None) -> dict:
    for name, token in named.items():
        if token is not None and token not in special:
            raise TokenizerError(f"{name} {token!r} is not among special_tokens {list(special)}")
    return {
        f"{name}_id": None if token is None else backend.token_to_id(token)
        for name, token in named.items()
    }
