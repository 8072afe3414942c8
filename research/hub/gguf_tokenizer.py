"""The tokenizer that a GGUF file describes in its metadata.

`tokenizer.ggml.model` says which algorithm: 'gpt2' is byte-level BPE with merges, split first as
`tokenizer.ggml.pre` names; 'llama' is SentencePiece BPE, whose merges follow from the scores of
the pieces.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Backend

from research.hub.checkpoint import CheckpointError
from research.hub.gguf import Metadata
from research.tokenize import spm
from research.tokenize.tokenizer import Tokenizer

MERGEABLE = (spm.NORMAL, spm.UNUSED)  # tokenizer.ggml.token_type has SentencePiece's numbers

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split by `pattern` instead of GPT-2's own."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level]
    )


PRE_TOKENIZERS = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "llama-bpe": lambda: _split(LLAMA3_SPLIT),
    "llama3": lambda: _split(LLAMA3_SPLIT),
    "qwen2": lambda: _split(QWEN2_SPLIT),
}
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3")  # a word that is a token needs no merges


def tokenizer_of(path: Path, metadata: Metadata) -> Tokenizer:
    """The tokenizer with its special tokens and chat template.

    Raises CheckpointError naming the model or the pre-tokenizer when it is not known here.
    """
    kind = metadata("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = byte_level_bpe(path, metadata)
    elif kind == "llama":
        backend = sentencepiece_bpe(metadata)
    else:
        raise CheckpointError(
            f"{path}: tokenizer model {kind!r} (tokenizer.ggml.model) is not supported; "
            "supported: gpt2, llama"
        )
    tokens = metadata("tokenizer.ggml.tokens")
    for token, type_ in zip(tokens, metadata("tokenizer.ggml.token_type"), strict=True):
        if type_ in (spm.CONTROL, spm.USER_DEFINED):
            special = type_ == spm.CONTROL
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    ids = {
        name: metadata(f"tokenizer.ggml.{name}_token_id", None)
        for name in ("bos", "eos", "padding", "unknown", "eot")
    }
    whole = kind == "llama" or metadata("tokenizer.ggml.pre", None) in WHOLE_WORDS_FIRST
    if metadata("tokenizer.ggml.add_bos_token", whole) and ids["bos"] is not None:
        bos = tokens[ids["bos"]]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, ids["bos"])]
        )
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["padding"],
        unk_id=ids["unknown"],
        chat_template=metadata("tokenizer.chat_template", None),
        stop_ids=tuple(dict.fromkeys(i for i in (ids["eos"], ids["eot"]) if i is not None)),
        template_name=f"{path} (tokenizer.chat_template)",
    )


def byte_level_bpe(path: Path, metadata: Metadata) -> Backend:
    pre = metadata("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not supported; "
            f"supported: {', '.join(PRE_TOKENIZERS)}"
        )
    vocab = {token: index for index, token in enumerate(metadata("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in metadata("tokenizer.ggml.merges")]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS_FIRST))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def sentencepiece_bpe(metadata: Metadata) -> Backend:
    """As spm.py builds it from a tokenizer.model; GGUF files keep no character normalization."""
    tokens, types = metadata("tokenizer.ggml.tokens"), metadata("tokenizer.ggml.token_type")
    scored = zip(tokens, metadata("tokenizer.ggml.scores"), types, strict=True)
    pieces = [(token, score) for token, score, type_ in scored if type_ in MERGEABLE]
    backend = Backend(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            spm.merges(pieces),
            unk_token=tokens[metadata("tokenizer.ggml.unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=spm.BYTE in types,
        )
    )
    steps = [decoders.Replace(spm.SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Replace(" ", spm.SPACE)
    if metadata("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(spm.SPACE), backend.normalizer]
        )
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend
