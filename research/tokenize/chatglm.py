"""ChatGLM-6B's tokenizer: a SentencePiece model, `ice_text.model`, that has pieces for white space.

Du et al. 2022, GLM (arXiv:2103.10360). Before SentencePiece sees a text, its code writes a line
break as <n>, a tab as <|tab|> and k blanks, 2 <= k <= 80, as <|blank_k|>, the longest first: 161
blanks are two pieces of 80 and a blank. Decoding writes them back, also where a text spells such a
name itself. [gMASK] and <sop> end a prompt.

The file's name is the mark of this model: ChatGLM2 and 3 have a `tokenizer.model`, and none of this.
Ids are those of the last release, whose text tokens begin at 0; in the first upload 20,000 tokens of
images stood before them, and the pieces above were added in code.
"""

from __future__ import annotations

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, processors

from research.tokenize import spm

VOCABULARY = "ice_text.model"
LONGEST_BLANK = 80

WHITE_SPACE = (
    ("\n", "<n>"),
    ("\t", "<|tab|>"),
    *((" " * count, f"<|blank_{count}|>") for count in range(LONGEST_BLANK, 1, -1)),
)
MASK, START, END = "[gMASK]", "<sop>", "<eop>"

# What the original code names these where a tokenizer_config.json does not.
SPECIAL = {"bos_token": START, "eos_token": END, "pad_token": "<pad>", "unk_token": "<unk>"}

# Fields of a tokenizer_config.json that change ids, and what they are in the last release.
FIELDS = {"num_image_tokens": 0, "do_lower_case": False, "remove_space": False}


def backend(model: sentencepiece_model_pb2.ModelProto, name: str = VOCABULARY) -> Tokenizer:
    """The pipeline of a parsed `ice_text.model`; `name` is what errors call it.

    SentencePieceError when pieces for white space or the tokens that end a prompt are not in it.
    """
    there = {piece.piece for piece in model.pieces}
    needed = (*(piece for _, piece in WHITE_SPACE), MASK, START, END)
    lacking = [piece for piece in needed if piece not in there]
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise spm.SentencePieceError(
            f"{name} lacks {len(lacking)} of ChatGLM-6B's pieces: {shown} (the file of the first "
            "upload has none for white space; expected that of the last release)"
        )
    tokenizer = spm.backend(model, WHITE_SPACE)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {MASK} {START}",
        pair=f"$A {MASK} {START} $B {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (MASK, START, END)],
    )
    return tokenizer


def unsupported(config: dict) -> str | None:
    """What a tokenizer_config.json asks for that is not done here, by name; None if nothing."""
    for name, expected in FIELDS.items():
        if config.get(name, expected) != expected:
            return f"{name} = {config[name]!r} is not implemented; expected {expected!r}"
    return None
