"""The Chinese text and conversations that experiments share, on little data and on the real rows."""

import numpy as np
import pytest

from experiments.shared import chinese
from research.data import corpora, packing
from research.tokenize import layout
from research.tokenize.formats import BAICHUAN2, CHATGLM2
from research.tokenize.tokenizer import TokenizerError

TEXTS = ["学而时习之，不亦说乎？", "有朋自远方来，不亦乐乎？ sop", "人不知而不愠，不亦君子乎？"]
ROWS = [
    {"instruction": "你好", "output": "你好！有什么可以帮你？"},
    {"instruction": "哲学是什么", "input": "[gMASK]", "output": "、".join(map(str, range(200)))},
    {"instruction": "二加二", "output": "四"},
    {"instruction": "早上好", "output": "早上好！"},
]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        corpora, "alpaca_zh", lambda: [(str(place), row) for place, row in enumerate(ROWS)]
    )
    return chinese.read(TEXTS, 470, 100, share=1 / 3, rows=1)


def test_control_tokens_have_the_ids_that_the_layouts_name(small):
    tokenizer = small.text.tokenizer
    named = [tokenizer.id_to_token(index) for index in (195, 196, 197)]
    assert named[:2] == ["<reserved_195>", "<reserved_196>"] and len(named[2]) == 1
    answer = tokenizer.encode("四")
    messages = [{"role": "user", "content": "二"}, {"role": "assistant", "content": "四"}]
    ids, mask = layout.encode(tokenizer, BAICHUAN2, messages)
    assert ids.tolist() == [195, *tokenizer.encode("二"), 196, *answer, tokenizer.eos_id]
    ids, mask = layout.encode(tokenizer, CHATGLM2, messages)
    assert ids[:2].tolist() == [tokenizer.id_of("[gMASK]"), tokenizer.id_of("sop")]
    assert ids[mask == 1].tolist() == [*answer, tokenizer.eos_id]


def test_streams_are_the_texts_and_their_ends_and_no_control_token(small):
    tokenizer = small.text.tokenizer
    kept = [small.text.train, small.text.held_out]
    assert [int((part == tokenizer.eos_id).sum()) for part in kept] == [2, 1]
    read = [tokenizer.decode(part[:-1].tolist()) for part in kept]
    assert sorted("".join(read)) == sorted("".join(TEXTS))  # "sop" too, which decoding would hide
    assert set(np.concatenate(kept)[np.concatenate(kept) < 197]) == {tokenizer.eos_id}


def test_every_layout_has_the_same_conversations_and_answers(small):
    assert len(small.held_out) == 1 and len(small.train) == 2  # one is too long
    tables = [
        chinese.packed(small.text.tokenizer, format, small.train, 100) for format in chinese.LAYOUTS
    ]
    learned = [
        sorted(example.targets[example.weights == 1].tolist() for example in packing.unpack(table))
        for table in tables
    ]
    assert learned[0] == learned[1] and len(learned[0]) == 2
    said = [small.text.tokenizer.decode(ids) for ids in learned[0]]
    assert chinese.answer_bytes(small.train) == len("".join(said).encode())


def test_a_piece_that_is_called_like_a_control_token_is_an_error():
    tokenizer = chinese.tokenizer_of(460, ["sop sop sop sop"])
    with pytest.raises(TokenizerError, match=r"control tokens \['sop'\] of plain text"):
        chinese.stream(tokenizer, ["sop"])


@pytest.mark.data
def test_real_conversations_mostly_fit():
    found = chinese.read(corpora.fortunes_zh(), 3072, 512)
    assert (len(found.train), len(found.held_out)) == (895, 99)
    places = [place for place, _ in [*found.train, *found.held_out]]
    assert len(set(places)) == len(places)
    assert 300_000 < len(found.text.train) < 400_000 and len(found.text.held_out) > 35_000
