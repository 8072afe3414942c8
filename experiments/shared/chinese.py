"""Chinese text and conversations under one tokenizer, for experiments that compare chat layouts.

    data = chinese.read(texts, vocab_size, length)        # streams, and conversations that fit
    table = chinese.packed(data.text.tokenizer, formats.CHATGLM2, data.held_out, length)

The text is the caller's, the conversations are Chinese Alpaca's 1,000. What is held out is drawn
once and for all, whatever the seed of a run. The tokenizer has the control tokens of ChatGLM2's and
Baichuan 2's layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from experiments.shared import small_lm
from experiments.shared.small_lm import END
from research.data import corpora, formats, packing, shuffle, supervised
from research.tokenize import layout
from research.tokenize.control import encode_literally
from research.tokenize.formats import BAICHUAN2, CHATGLM2, CHATGLM2_TOKENS
from research.tokenize.layout import Format
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.train import train_bpe

LAYOUTS = (CHATGLM2, BAICHUAN2)
LAST_CONTROL = max(token for token in BAICHUAN2.control if isinstance(token, int))
SPLIT_SEED = 0

T = TypeVar("T")
Conversation = tuple[str, list[dict[str, Any]]]  # (place, messages)


class Chinese(NamedTuple):
    """Streams of text to pretrain on; conversations to train on, and held out."""

    text: small_lm.Data
    train: list[Conversation]
    held_out: list[Conversation]


def read(
    texts: Sequence[str], vocab_size: int, length: int, share: float = 0.1, rows: int = 100
) -> Chinese:
    """Of the texts `share` is held out, of the conversations `rows`.

    The tokenizer is trained on the others. Conversations of more than `length` tokens in any of
    LAYOUTS are left out, so that every layout has the same ones.
    """
    parts = split(texts, round(share * len(texts)))
    pairs = split(list(formats.conversations(corpora.alpaca_zh())), rows)
    said = [message["content"] for _, messages in pairs[0] for message in messages]
    tokenizer = tokenizer_of(vocab_size, [*parts[0], *said])
    streams = [stream(tokenizer, part) for part in parts]
    fitting = [[p for p in part if longest(tokenizer, p[1]) <= length] for part in pairs]
    return Chinese(small_lm.Data(tokenizer, *streams), *fitting)


def split(items: Sequence[T], held_out: int) -> tuple[list[T], list[T]]:
    """(to train on, held out)."""
    order = shuffle.permutation(SPLIT_SEED, 0, len(items))
    return [items[i] for i in order[held_out:]], [items[i] for i in order[:held_out]]


def tokenizer_of(vocab_size: int, texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE whose first ids are control tokens, up to those that Baichuan's layout
    knows by their number."""
    named = (END, *CHATGLM2_TOKENS)
    reserved = [f"<reserved_{index}>" for index in range(len(named), LAST_CONTROL + 1)]
    return train_bpe(texts, vocab_size, (*named, *reserved), eos=END, pad=END)


def stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Every text and its end. The "sop" of an English word is no control token; TokenizerError when
    training has made it a token of its own, which then has the other's id."""
    encode = partial(encode_literally, tokenizer, control=range(LAST_CONTROL + 1))
    rows = [[*encode(text)[0], tokenizer.eos_id] for text in texts]
    return np.concatenate(rows).astype(np.int32)


def longest(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> int:
    """Tokens of a conversation in the layout that needs most."""
    return max(len(layout.encode(tokenizer, each, messages)[0]) for each in LAYOUTS)


def packed(
    tokenizer: Tokenizer, format: Format, conversations: Sequence[Conversation], length: int
) -> packing.Table:
    """Rows of `length` tokens with loss on the answers; ValueError for a longer conversation."""
    encode = partial(layout.encode, tokenizer, format)
    kept, counts = supervised.examples(conversations, encode, length, truncate="error")
    print(f"  {counts}", flush=True)
    return packing.pack(kept, length)


def answer_bytes(conversations: Sequence[Conversation]) -> int:
    """UTF-8 bytes of the last answers."""
    return sum(len(messages[-1]["content"].encode()) for _, messages in conversations)
