"""The tokenizer command: trains from files, saves, and counts by hand numbers."""

import pytest

from research.tokenize.tokenizer import Tokenizer
from scripts import tokenizer as script

TEXT = "the cat sat on the mat, the end. " * 40


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize(("kind", "size"), [("bpe", 280), ("unigram", 292), ("sp-bpe", 300)])
def test_train_saves_what_compare_opens(file, tmp_path, capsys, kind, size):
    directory = str(tmp_path / kind)
    script.main(["train", directory, file, "--vocab", str(size), "--kind", kind])
    again = Tokenizer.from_directory(directory)
    assert again.decode(again.encode(TEXT)) == TEXT and again.vocab_size <= size
    script.main(["compare", directory, "--text", file])
    last = capsys.readouterr().out.splitlines()[-1]
    tokens = len(again.encode(TEXT))
    assert f"| text.txt | {tokens / 320:.2f} | {tokens / 1320:.2f} | {1320 / tokens:.2f} |" in last


def test_fertility_by_hand():
    bytes_only = script.train_bpe(["x"], 257)
    assert script.fertility(bytes_only, ["ab cd", "é"]) == (7 / 3, 7 / 6, 1.0)


def test_what_it_says_of_bad_input(file, tmp_path):
    for words, message in [
        (["compare", "nothing", "--text", file], "nothing is neither a path nor one of gpt2"),
        (["train", str(tmp_path / "d"), "--vocab", "300"], "either text files or --corpus"),
        (["train", str(tmp_path / "d"), file, "--vocab", "10"], "vocab_size 10 is less than 257"),
    ]:
        with pytest.raises(SystemExit, match=message):
            script.main(words)
