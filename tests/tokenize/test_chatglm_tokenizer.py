"""ChatGLM-6B's tokenizer: ids and offsets of the slow form, str.replace before SentencePiece."""

import io
import json
import random

import pytest
import sentencepiece

from research.hub import pretrained
from research.hub.checkpoint import CheckpointError
from research.tokenize import chatglm, formats, layout, spm
from research.tokenize.tokenizer import Tokenizer, TokenizerError

CORPUS = [
    "def add(a, b):",
    "return a + b # 12345",
    "The quick brown fox jumps over the lazy dog.",
    "你好，世界。我们在学习语言模型。",
    "<|abc|> <n 67890",
] * 8
LENGTHS = (1, 2, 79, 80, 81, 161)
TEXTS = [
    *(
        "",
        "\n",
        "\t",
        " a",
        "\n\n",
        "a\n",
        "\na",
        "\n a",
        " \na",
        "a<n>b",
        "<n",
        "你好，\n世界。 我们",
    ),
    "def add(a, b):\n    return a + b\n\n\treturn b\n",
    *(f"{before}{' ' * k}{after}" for k in LENGTHS for before in ("", "a") for after in ("", "b")),
]
NAMES = [("\n", "<n>"), ("\t", "<|tab|>")]
NAMES += [(" " * k, "<|blank_" + str(k) + "|>") for k in range(80, 1, -1)]


def train(model_type, names=tuple(name for _, name in NAMES)):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type=model_type,
        vocab_size=470,
        **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3},
        user_defined_symbols=list(names),
        control_symbols=["[MASK]", "[gMASK]", "<sop>", "<eop>"],
        byte_fallback=True,
        required_chars="<0x123456789ABCDEF>[]gMSKop",
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def proto(request):
    return train(request.param)


@pytest.fixture
def directory(proto, tmp_path):
    (tmp_path / "ice_text.model").write_bytes(proto)
    (tmp_path / "tokenizer_config.json").write_text('{"num_image_tokens": 0}')
    return tmp_path


def slow(proto, text):
    """(ids, offsets) of SentencePiece on the replaced text; a span of nothing is None."""
    at = [(i, i + 1) for i in range(len(text))]
    for white, name in NAMES:
        while (i := text.find(white)) >= 0:
            at[i : i + len(white)] = [(at[i][0], at[i + len(white) - 1][1])] * len(name)
            text = text[:i] + name + text[i + len(white) :]
    at = [span for span, letter in zip(at, text, strict=True) for _ in letter.encode()]
    found = sentencepiece.SentencePieceProcessor(model_proto=proto).encode(
        text, return_type="proto"
    )
    pieces = [(p.id, p.begin, p.end) for p in found.pieces]
    return [i for i, _, _ in pieces], [
        (at[begin][0], at[end - 1][1]) if end > begin else None for _, begin, end in pieces
    ]


def test_ids_offsets_and_text_are_those_of_the_slow_form(proto, directory):
    tokenizer = Tokenizer.from_directory(directory)
    rng = random.Random(0)
    parts = ["a", "the", " ", "  ", "\n", "\t", "你", "<", "n", ">", "<|", "|>", "1"]
    drawn = ["".join(rng.choices(parts, k=14)) for _ in range(100)]
    for text in [*TEXTS, *drawn]:
        expected, expected_spans = slow(proto, text)
        ids, spans = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text) == expected
        for span, known in zip(spans, expected_spans, strict=True):
            assert known in (None, span), text
        assert tokenizer.decode(ids) == text.replace("<n>", "\n")


def test_special_tokens_and_the_end_of_a_prompt(directory):
    tokenizer = Tokenizer.from_directory(directory)
    gmask, start, end = (tokenizer.id_of(name) for name in ("[gMASK]", "<sop>", "<eop>"))
    ids = tokenizer.encode("a\n")
    assert tokenizer.encode("a\n", add_special=True) == [*ids, gmask, start]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (start, end, 3)
    said = [{"role": "user", "content": "a\n[gMASK]<eop>"}, {"role": "assistant", "content": "\n"}]
    ids, mask = layout.encode(tokenizer, formats.CHATGLM, said)
    newline = tokenizer.id_of("<n>")
    assert ids[-5:].tolist() == [gmask, start, tokenizer.id_of("▁"), newline, end]
    assert mask.sum() == 3 and ids.tolist().count(gmask) == 1 and ids.tolist().count(end) == 1
    alone = Tokenizer.from_sentencepiece(directory / "ice_text.model")
    assert (alone.encode("\n\n"), alone.bos_id) == (tokenizer.encode("\n\n"), start)


def test_saved_and_read_again(proto, directory, tmp_path):
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out" / "ice_text.model").read_bytes() == proto
    for _ in range(2):  # by tokenizer.json, then by the original's file
        again = Tokenizer.from_directory(tmp_path / "out")
        for text in TEXTS:
            assert again.encode(text, add_special=True) == tokenizer.encode(text, add_special=True)
        for field in ("bos_id", "eos_id", "pad_id", "unk_id", "stop_ids", "sentencepiece"):
            assert getattr(again, field) == getattr(tokenizer, field)
        (tmp_path / "out" / "tokenizer.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_image_tokens", 20000), ("do_lower_case", True), ("remove_space", True)],
)
def test_what_would_change_ids_is_refused(directory, name, value):
    (directory / "tokenizer_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json: {name} = {value}"):
        Tokenizer.from_directory(directory)


def test_wrong_files(directory, tmp_path):
    with pytest.raises(TokenizerError, match=r"neither .* nor ice_text\.model"):
        (tmp_path / "empty").mkdir()
        Tokenizer.from_directory(tmp_path / "empty")
    (directory / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model and ice_text\.model"):
        Tokenizer.from_directory(directory)
    (directory / "tokenizer.model").unlink()
    (directory / "ice_text.model").write_bytes(train("bpe", ("<n>",)))
    with pytest.raises(spm.SentencePieceError, match=r"lacks 80 .*<\|tab\|>"):
        Tokenizer.from_directory(directory)


def test_hub_finds_it_and_refuses_moved_ids(directory):
    tokenizer = pretrained.read_tokenizer(directory)
    assert tokenizer.bos_id == tokenizer.id_of(chatglm.START)
    config = {"model_type": "chatglm", "position_encoding_2d": True, "vocab_size": 150_528}
    pretrained._require_fit(directory, config | {"bos_token_id": tokenizer.bos_id}, tokenizer)
    with pytest.raises(CheckpointError, match="bos_token_id 150004, the tokenizer"):
        pretrained._require_fit(directory, config | {"bos_token_id": 150_004}, tokenizer)
