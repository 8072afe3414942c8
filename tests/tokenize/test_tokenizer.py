"""Tokenizers: exact round trips, files that are written and read again, clear errors."""

import json
import os
import random
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece

from research.tokenize import chat, spm
from research.tokenize.tokenizer import Tokenizer, TokenizerError
from research.tokenize.train import train_bpe, train_sentencepiece

REFERENCE = Path(__file__).parents[2] / ".references" / "venv" / "bin" / "python"
CORPUS = [
    "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs.\n" * 8,
    "def add(a, b):\n    return a + b  # 12345\n" * 8,
    "你好，世界。我们在学习语言模型。\n" * 8,
]


def odd_texts(count=60, seed=0):
    """Random texts of letters, spaces, controls, byte names and any code point but ▁."""
    rng = random.Random(seed)
    common = ["a", "the", " ", "  ", "\n", "\t", "é", "你", "😀", "<0x0A>", "\x00", "1"]
    for _ in range(count):
        wide = [chr(rng.randrange(1, 0xD800)), chr(rng.randrange(0xE000, 0x110000))]
        yield "".join(rng.choice(common + wide) for _ in range(25)).replace("▁", "")


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(
        CORPUS,
        400,
        chat.CHATML_TOKENS,
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=chat.CHATML,
    )


def test_bpe_round_trip_is_exact(bpe):
    for text in [*CORPUS, *odd_texts()]:
        assert bpe.decode(bpe.encode(text)) == text
    every = "".join(chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000)
    assert bpe.decode(bpe.encode(every)) == every


def test_bpe_merges_apply_lowest_rank_first(bpe):
    """The slow definition: while any pair of neighbours is a merge, merge the lowest rank."""
    model = json.loads(bpe.backend.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    for word in ["quick", "jumps", "return", "liquor", "unseenwordthe"]:
        symbols = list(word)
        while True:
            pairs = [(ranks.get(p, 1 << 30), i) for i, p in enumerate(pairwise(symbols))]
            rank, i = min(pairs, default=(1 << 30, 0))
            if rank == 1 << 30:
                break
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        assert [bpe.id_to_token(t) for t in bpe.encode(word)] == symbols


def test_special_tokens_are_found_and_skipped(bpe):
    ids = bpe.encode("hi<|im_end|>")
    assert ids[-1] == bpe.eos_id == bpe.token_to_id("<|im_end|>") == bpe.stop_ids[0]
    assert bpe.decode(ids) == "hi"
    assert bpe.decode(ids, skip_special=False) == "hi<|im_end|>"
    assert bpe.vocab_size == 1 + max(bpe.backend.get_vocab().values()) <= 400


def test_offsets_tile_the_text(bpe):
    text = "  the\n\nfox 你😀!"
    ids, offsets = bpe.encode_with_offsets(text)
    assert ids == bpe.encode(text) and len(ids) == len(offsets)
    assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
    for (_, end), (start, _) in pairwise(offsets):
        assert start <= end  # no character between two tokens is lost


def test_training_is_deterministic(bpe):
    again = train_bpe(CORPUS, 400, chat.CHATML_TOKENS, eos="<|im_end|>")
    assert again.backend.to_str() == bpe.backend.to_str()
    first, second = (train_sentencepiece(CORPUS, 335) for _ in range(2))
    assert first.sentencepiece == second.sentencepiece


def test_training_reads_files(tmp_path, bpe):
    paths = [tmp_path / f"{i}.txt" for i in range(len(CORPUS))]
    for path, text in zip(paths, CORPUS, strict=True):
        path.write_text(text, encoding="utf-8")
    assert train_bpe(paths, 400, chat.CHATML_TOKENS).backend.to_str() == bpe.backend.to_str()


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_sentencepiece_ids_are_its_own(model_type, normalization):
    ours = train_sentencepiece(CORPUS, 335, model_type=model_type, normalization=normalization)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=ours.sentencepiece)
    for text in [*CORPUS, *odd_texts(), "", " ", "  the  fox "]:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(theirs.encode(text))
        if normalization == "identity":
            assert ours.decode(ids) == text
        if "  " not in text:  # runs of spaces can be cut in two ways of equal score
            assert ids == theirs.encode(text)
    assert (ours.unk_id, ours.bos_id, ours.eos_id) == (0, 1, 2)
    assert ours.vocab_size == theirs.vocab_size()


def test_save_and_load_give_equal_ids(bpe, tmp_path):
    speak = train_sentencepiece(CORPUS, 420, ["<|im_end|>"], model_type="bpe", eos="<|im_end|>")
    for name, tokenizer in {"bpe": bpe, "sentencepiece": speak}.items():
        tokenizer.save(tmp_path / name)
        again = Tokenizer.from_directory(tmp_path / name)
        for text in [*CORPUS, *odd_texts(20), "a<|im_end|>b"]:
            assert again.encode(text) == tokenizer.encode(text)
        for field in ("bos_id", "eos_id", "pad_id", "unk_id", "stop_ids", "chat_template"):
            assert getattr(again, field) == getattr(tokenizer, field)
        assert again.sentencepiece == tokenizer.sentencepiece


def test_tokenizer_model_alone_is_enough(tmp_path):
    tokenizer = train_sentencepiece(CORPUS, 420, model_type="bpe")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.sentencepiece)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = Tokenizer.from_directory(tmp_path)
    assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert again.encode("fox", add_special=True) == [1, *tokenizer.encode("fox")]
    assert (again.bos_id, again.eos_id) == (1, 2)


def test_several_stop_ids_survive(bpe, tmp_path):
    two = Tokenizer(bpe.backend, eos_id=bpe.eos_id, stop_ids=(bpe.eos_id, 0))
    two.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).stop_ids == (bpe.eos_id, 0)


@pytest.mark.reference
def test_transformers_opens_what_we_save(bpe, tmp_path):
    if not REFERENCE.exists():
        pytest.skip("no reference libraries in .references/venv")
    speak = train_sentencepiece(CORPUS, 335, model_type="unigram")
    tokenizers = {"bpe": bpe, "unigram": speak}
    texts = [*CORPUS, *odd_texts(10), "a<|im_end|>b"]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好"}]
    for name, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / name)
    (tmp_path / "in.json").write_text(json.dumps([texts, talk]))
    code = """
import json, sys
from transformers import AutoTokenizer
texts, talk = json.load(open(sys.argv[1] + "/in.json"))
out = {}
for name in ("bpe", "unigram"):
    t = AutoTokenizer.from_pretrained(sys.argv[1] + "/" + name)
    out[name] = [t(x, add_special_tokens=False)["input_ids"] for x in texts] + [t.eos_token_id]
    if name == "bpe":
        out["chat"] = t.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
print(json.dumps(out))
"""
    done = subprocess.run(
        [REFERENCE, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name, tokenizer in tokenizers.items():
        assert theirs[name] == [tokenizer.encode(text) for text in texts] + [tokenizer.eos_id]
    assert theirs["chat"] == chat.render(bpe, talk, add_generation_prompt=True)


def test_errors_name_the_file(bpe, tmp_path):
    with pytest.raises(TokenizerError, match="nowhere is not a directory"):
        Tokenizer.from_directory(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)
    bpe.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not valid JSON"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</nothing>"}')
    with pytest.raises(TokenizerError, match="eos_token '</nothing>' is not in the vocabulary"):
        Tokenizer.from_directory(tmp_path)


def test_other_bad_input(bpe):
    with pytest.raises(spm.SentencePieceError, match="is not a SentencePiece model"):
        spm.parse(b"not a model")
    with pytest.raises(TokenizerError, match="eos_id 99999 is not in the vocabulary"):
        Tokenizer(bpe.backend, eos_id=99999)
    with pytest.raises(TokenizerError, match="no text to train"):
        train_bpe([" ", "\n"], 400)
    with pytest.raises(TokenizerError, match="vocab_size 100 is less than 257"):
        train_bpe(CORPUS, 100)
    with pytest.raises(TokenizerError, match="cannot train 100000 pieces"):
        train_sentencepiece(CORPUS, 100000)
    with pytest.raises(TokenizerError, match="eos '<end>' is not among special_tokens"):
        train_bpe(CORPUS, 400, eos="<end>")


def test_a_save_that_fails_leaves_the_old_tokenizer(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whole = Path.write_text

    def full(path, text, **how):
        if path.name == "chat_template.jinja":
            raise OSError(28, "No space left on device")
        return whole(path, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        train_bpe(CORPUS, 300, chat.CHATML_TOKENS, chat_template="other").save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("moves", range(4))
def test_a_killed_save_is_the_new_tokenizer_or_none(bpe, tmp_path, monkeypatch, moves):
    """Killed before each of its renames, over an older tokenizer of another vocabulary."""
    train_bpe(CORPUS, 300, chat.CHATML_TOKENS, chat_template="other").save(tmp_path)
    done, rename = [], os.replace

    def killed(source, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bpe.save(tmp_path)
    with pytest.raises(TokenizerError, match=r"neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_directory(tmp_path)


def test_a_save_over_another_leaves_nothing_of_it(bpe, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"of another")
    bpe.save(tmp_path)
    train_bpe(CORPUS, 300, chat.CHATML_TOKENS).save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).chat_template is None
    assert not (tmp_path / "tokenizer.model").exists()
