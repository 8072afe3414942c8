"""Text to ids and back: one form over a `tokenizers` pipeline, with the ids that matter by name.

A directory is read as `transformers` reads it (`tokenizer_files`); what `save` writes,
`transformers` opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from research.tokenize import tokenizer_files as files
from research.tokenize.tokenizer_files import NAMED, SENTENCEPIECE, TokenizerError


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """`backend` and the ids of its special tokens; an id is None when there is no such token.

    `stop_ids` end a generated answer; (eos_id,) unless given. `chat_template` is Jinja source and
    `template_name` says where it came from, for error messages. `sentencepiece` is the serialized
    SentencePiece model where the tokenizer came from one, so that `save` can write it again as
    `sentencepiece_name`.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()
    template_name: str = "chat template"
    sentencepiece: bytes | None = None
    sentencepiece_name: str = SENTENCEPIECE[0]

    def __post_init__(self):
        # Truncation and padding stored in a tokenizer.json would cut texts silently.
        self.backend.no_truncation()
        self.backend.no_padding()
        if not self.stop_ids and self.eos_id is not None:
            object.__setattr__(self, "stop_ids", (self.eos_id,))
        named = {f"{name}_id": getattr(self, f"{name}_id") for name in NAMED}
        for name, token_id in [*named.items(), *(("stop_ids", i) for i in self.stop_ids)]:
            if token_id is not None and self.backend.id_to_token(token_id) is None:
                raise TokenizerError(
                    f"{name} {token_id} is not in the vocabulary of {self.vocab_size} tokens"
                )

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer in a model directory; TokenizerError names the file that is wrong."""
        return cls(**files.read(Path(directory)))

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> Tokenizer:
        """A SentencePiece model file alone, with the special tokens that its trainer named."""
        return cls(**files.read_sentencepiece(Path(path)))

    def save(self, directory: str | Path) -> None:
        """Write files from which `from_directory` and `transformers` give the same ids.

        All are written before the first gets its name: when a disk is full (OSError) the directory
        is as it was. A save that is killed leaves no tokenizer rather than half of one.
        """
        files.write(self, Path(directory))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The backend without its post-processor, which may cut spaces off the offsets."""
        if self.backend.post_processor is None:
            return self.backend
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.post_processor = None
        return copy

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised. `add_special` adds the
        bos or eos that the tokenizer's post-processor asks for."""
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, [(start, end)]) with offsets in characters of `text`, nothing added.

        Tokens that hold parts of one character all have that character's span.
        """
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, spans(encoding.offsets)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text; TokenizerError when an id is outside the vocabulary or stands for no token."""
        ids = [int(i) for i in ids]
        for token_id in set(ids):
            if self.id_to_token(token_id) is None:
                raise TokenizerError(
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens"
                )
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_of(self, token: str) -> int:
        """The id of a token that must be there, a control token say; TokenizerError if it is not."""
        token_id = self.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"token {token!r} is not in the vocabulary of {self.vocab_size} tokens"
            )
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(int(token_id)) if 0 <= token_id < self.vocab_size else None


def spans(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The offsets of `tokenizers`, widened to the left where characters lie between two tokens.

    It aligns what a normalizer writes for several characters with the last of them.
    """
    widened, last, start, end = [], None, 0, 0
    for span in offsets:
        if span != last:  # else both are parts of one thing
            start = min(span[0], end)
        last, end = span, max(end, span[1])
        widened.append((start, span[1]))
    return widened
