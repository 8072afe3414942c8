"""A SentencePiece model as a `tokenizers` pipeline with the same ids (Kudo & Richardson 2018).

Unigram (Kudo 2018) keeps its pieces and scores; Viterbi over them is the same in both libraries.
BPE has no merge list in the file: two neighbours merge when their concatenation is a piece, the
piece of the highest score first, which is the merge list built here.

User-defined pieces are found in the normalized text and stay whole. A Unigram model finds them
itself, since they cost next to nothing; beside a BPE they are added tokens, looked for after the
normalizer.

Control pieces (<s>, </s>, chat markers) are found in the text, which SentencePiece itself never
does; everything else is equal, and tests compare the two. (Two Unigram segmentations of exactly
equal score, a run of spaces cut in two ways say, may be told apart differently. In a BPE with a
dummy prefix, a text that is nothing but a user-defined piece's name lacks the prefix. With a table of
characters to be folded, combining marks may be folded differently.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2

SPACE = "▁"
ALONE = "\ufdd0"  # no character: marks a text for as long as it is normalized


class SentencePieceError(ValueError):
    """The bytes are not a SentencePiece model, or one of a kind that is not supported."""


def parse(proto: bytes, name: str = "tokenizer.model") -> sentencepiece_model_pb2.ModelProto:
    """The model message; SentencePieceError names the file when the bytes are something else."""
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(proto)
    except Exception as error:
        raise SentencePieceError(f"{name} is not a SentencePiece model: {error}") from error
    if not model.pieces:
        raise SentencePieceError(f"{name} is not a SentencePiece model: it has no pieces")
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
        raise SentencePieceError(f"{name} is a {kind} model; expected UNIGRAM or BPE")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise SentencePieceError(f"{name} writes whitespace as a suffix, which is not supported")
    return model


def backend(
    model: sentencepiece_model_pb2.ModelProto, written: Sequence[tuple[str, str]] = ()
) -> Tokenizer:
    """The `tokenizers` pipeline that gives the ids of SentencePiece's own encoder.

    `written` are (text, piece) replacements made in this order before SentencePiece's own
    normalization, and taken back when ids are decoded.
    """
    unigram = model.trainer_spec.model_type == UNIGRAM
    tokenizer = Tokenizer(unigram_model(model) if unigram else bpe_model(model))
    steps = [normalizers.Replace(text, piece) for text, piece in written]
    steps += _normalizer(model.normalizer_spec)
    names = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    if names and not unigram and model.normalizer_spec.add_dummy_prefix:
        steps = _without_prefix(names, steps)
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = _decoder(model.normalizer_spec.add_dummy_prefix, written)
    for piece in model.pieces:
        if piece.type == CONTROL:
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
    _add_user_defined(tokenizer, names, unigram)
    return tokenizer


def _add_user_defined(tokenizer: Tokenizer, names: Sequence[str], unigram: bool) -> None:
    """User-defined pieces that the model does not find by itself.

    One that the normalizer would change is looked for before it.
    """
    for name in names:
        changed = tokenizer.normalizer.normalize_str(name) not in (name, SPACE + name)
        if changed or not unigram:
            tokenizer.add_tokens([AddedToken(name, normalized=not changed)])


def _without_prefix(
    names: Sequence[str], steps: list[normalizers.Normalizer]
) -> list[normalizers.Normalizer]:
    """The steps, but that a text which is one of `names` gets no dummy prefix.

    An added token is looked for in the normalized text by its own normalized name, which must
    therefore stay as it is.
    """
    whole = rf"(?=(?:{'|'.join(map(re.escape, names))})\z)"
    before = normalizers.Replace(Regex(rf"\A{whole}"), ALONE)
    return [before, *steps, normalizers.Replace(Regex(rf"\A{SPACE}{ALONE}{whole}"), "")]


def unigram_model(model: sentencepiece_model_pb2.ModelProto) -> models.Unigram:
    # A byte piece is reached by fallback only: its name written out in the text ("<0x0A>") must
    # not match, so it gets a score that no path would choose, as long as the characters of the
    # name are pieces themselves. That of a user-defined piece is SentencePiece's own.
    fixed = {BYTE: -1e4, USER_DEFINED: -0.1}
    vocabulary = [(p.piece, fixed.get(p.type, p.score)) for p in model.pieces]
    unknown = next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN)
    return models.Unigram(vocabulary, unknown, byte_fallback=model.trainer_spec.byte_fallback)


def bpe_model(model: sentencepiece_model_pb2.ModelProto) -> models.BPE:
    vocabulary = {p.piece: i for i, p in enumerate(model.pieces)}
    scores = [(p.piece, p.score) for p in model.pieces if p.type in (NORMAL, UNUSED)]
    unknown = next(p.piece for p in model.pieces if p.type == UNKNOWN)
    return models.BPE(
        vocab=vocabulary,
        merges=merges(scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def merges(scores: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merge list of a BPE given as [(piece, score)]: highest score first, every split of it.

    Pieces that are bytes, control or unknown must not be among them.
    """
    scores = list(scores)
    ids = {piece: i for i, (piece, _) in enumerate(scores)}
    ordered = []
    for piece, _ in sorted(scores, key=lambda entry: -entry[1]):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        ordered += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return ordered


def _normalizer(
    spec: sentencepiece_model_pb2.NormalizerSpec,
) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps


def _decoder(dummy_prefix: bool, written: Sequence[tuple[str, str]]) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    steps += [decoders.Replace(piece, text) for text, piece in written]
    return decoders.Sequence(steps)
