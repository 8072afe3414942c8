"""Control tokens: adding them to a vocabulary, and keeping them out of what people write.

A control token (<|im_end|>, [gMASK], </s>) says something to the model about the text. It is put in
by its id. A user who types the same characters must get ordinary tokens, or else a message could
end itself and go on as another speaker.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import tokenizers
from tokenizers import AddedToken

from research.tokenize.tokenizer import Tokenizer, TokenizerError, spans


def add_control(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with control tokens after its last id, in the order of `names`.

    Some families (ChatGLM2) name them in their code and not in their files. TokenizerError when one
    is in the vocabulary already.
    """
    there = [name for name in names if tokenizer.token_to_id(name) is not None]
    if there:
        raise TokenizerError(f"{there} are in the vocabulary already")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return replace(tokenizer, backend=backend)


def encode_literally(
    tokenizer: Tokenizer, text: str, control: Iterable[int] = ()
) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, offsets) as `Tokenizer.encode_with_offsets`, with no special token found in the text.

    `control` are ids that must not come from text either, although the tokenizer does not call them
    special. TokenizerError when one comes out all the same.
    """
    control = frozenset(control)
    encoding = _literal(tokenizer, control).encode(text, add_special_tokens=False)
    found = control.intersection(encoding.ids)
    if found:
        names = [tokenizer.id_to_token(token_id) for token_id in sorted(found)]
        raise TokenizerError(f"this vocabulary makes control tokens {names} of plain text")
    return encoding.ids, spans(encoding.offsets)


@lru_cache(maxsize=16)
def _literal(tokenizer: Tokenizer, control: frozenset[int]) -> tokenizers.Tokenizer:
    """The pipeline without the added tokens that are special or in `control`.

    In a Unigram model every piece competes, so those pieces are renamed there to what cannot occur:
    a name with a space, which the normalizer has turned into ▁.
    """
    whole = json.loads(tokenizer.backend.to_str())
    added = whole["added_tokens"]
    hidden = {token["id"] for token in added if token["special"]} | control
    whole["added_tokens"] = [token for token in added if token["id"] not in hidden]
    whole["post_processor"] = None
    model = whole["model"]
    if model["type"] == "Unigram":
        unknown = model["unk_id"]
        for index in hidden - {unknown}:
            if index < len(model["vocab"]):
                model["vocab"][index][0] = " " + model["vocab"][index][0]
    return tokenizers.Tokenizer.from_str(json.dumps(whole))
