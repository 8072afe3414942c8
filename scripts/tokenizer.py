"""Train a tokenizer, and see how tokenizers cut texts.

python -m scripts.tokenizer train DIR --vocab 8000 [--kind bpe|unigram|sp-bpe] FILE.txt ...
python -m scripts.tokenizer train DIR --vocab 8000 --corpus shakespeare
python -m scripts.tokenizer compare gpt2 qwen DIR ... [--text FILE.txt ...]

`compare` shows tokens a word, tokens a character and bytes a token in English, Spanish and Chinese,
or in the files given. A tokenizer is a directory, a SentencePiece file, or the name of a published
one: gpt2, llama2, llama3, qwen, baichuan, mistral.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from research.data import corpora
from research.tokenize import published
from research.tokenize.tokenizer import Tokenizer, TokenizerError
from research.tokenize.train import train_bpe, train_sentencepiece

CORPORA: dict[str, Callable[[], list[str]]] = {
    "shakespeare": lambda: list(corpora.shakespeare().values()),
    "wiki": lambda: [corpora.wiki()],
    "english": lambda: [verse.english for verse in corpora.verses()[:2000]],
    "spanish": lambda: [verse.spanish for verse in corpora.verses()[:2000]],
    "chinese": lambda: [row["output"] for _, row in corpora.alpaca_zh()],
}
KINDS = {
    "bpe": train_bpe,
    "unigram": lambda texts, size: train_sentencepiece(texts, size, model_type="unigram"),
    "sp-bpe": lambda texts, size: train_sentencepiece(texts, size, model_type="bpe"),
}


def load(name: str) -> Tokenizer:
    """A published tokenizer by its name, or one from a directory or a SentencePiece file."""
    if name in published.BY_NAME:
        return published.BY_NAME[name]()
    path = Path(name)
    if not path.exists():
        raise TokenizerError(f"{name} is neither a path nor one of {', '.join(published.BY_NAME)}")
    return Tokenizer.from_directory(path) if path.is_dir() else Tokenizer.from_sentencepiece(path)


def fertility(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[float, float, float]:
    """(tokens a word, tokens a character, bytes a token); a word is what spaces separate."""
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    words = sum(len(text.split()) for text in texts)
    if tokens == 0:
        raise TokenizerError("the texts are empty")
    size = sum(len(text.encode("utf-8")) for text in texts)
    return tokens / max(words, 1), tokens / sum(map(len, texts)), size / tokens


def table(tokenizers: dict[str, Tokenizer], texts: dict[str, list[str]]) -> str:
    """Markdown: one line for a tokenizer and a text."""
    lines = ["| tokenizer | ids | text | tokens/word | tokens/character | bytes/token |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: |")
    for name, tokenizer in tokenizers.items():
        for text, pieces in texts.items():
            word, character, size = fertility(tokenizer, pieces)
            lines.append(
                f"| {name} | {tokenizer.vocab_size} | {text} | {word:.2f} | {character:.2f} | {size:.2f} |"
            )
    return "\n".join(lines)


def train(arguments: argparse.Namespace) -> None:
    """Train on files or a corpus and save."""
    if bool(arguments.files) == bool(arguments.corpus):
        raise TokenizerError("give either text files or --corpus, not both and not neither")
    texts = arguments.files or CORPORA[arguments.corpus]()
    tokenizer = KINDS[arguments.kind](texts, arguments.vocab)
    tokenizer.save(arguments.directory)
    print(f"{tokenizer.vocab_size} tokens in {arguments.directory}")


def compare(arguments: argparse.Namespace) -> None:
    """Print the table."""
    texts = {path.name: [path.read_text(encoding="utf-8")] for path in arguments.text}
    texts = texts or {name: CORPORA[name]() for name in ("english", "spanish", "chinese")}
    print(table({name: load(name) for name in arguments.names}, texts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train", help="train a tokenizer and save it")
    one.add_argument("directory", type=Path)
    one.add_argument("files", type=Path, nargs="*")
    one.add_argument("--vocab", type=int, required=True, help="ids at most")
    one.add_argument("--kind", choices=KINDS, default="bpe")
    one.add_argument("--corpus", choices=CORPORA)
    one.set_defaults(run=train)
    two = commands.add_parser("compare", help="how tokenizers cut texts")
    two.add_argument("names", nargs="+")
    two.add_argument("--text", type=Path, nargs="*", default=[])
    two.set_defaults(run=compare)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (TokenizerError, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
