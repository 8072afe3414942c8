"""Loss masks on real and made rows: what is learned is exactly the answers and their ends."""

from functools import partial

import numpy as np
import pytest

from research.data import corpora, formats, supervised
from research.hub.download import smollm2
from research.hub.gguf import open_gguf
from research.hub.gguf_tokenizer import tokenizer_of
from research.tokenize import chat
from research.tokenize.train import train_bpe


def tokenizer_for(texts, size=1000):
    return train_bpe(
        texts,
        size,
        chat.CHATML_TOKENS,
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|im_end|>",  # as in real models: pad equal to eos must not hide the eos
        chat_template=chat.CHATML,
    )


def learned(tokenizer, example):
    return tokenizer.decode(example.targets[example.weights != 0], skip_special=False)


def test_shift_by_hand():
    example = supervised.shift([5, 6, 7, 8], [0, 0, 1, 1])
    assert example.tokens.tolist() == [5, 6, 7, 8]
    assert example.targets.tolist() == [6, 7, 8, 8]
    assert example.weights.tolist() == [0, 1, 1, 0]


def test_a_prompt_before_an_example_by_hand():
    example = supervised.prepend(supervised.shift([5, 6, 7], [0, 1, 1]), [40, 41])
    assert example.tokens.tolist() == [40, 41, 5, 6, 7]
    assert example.targets.tolist() == [5, 5, 6, 7, 7]
    assert example.weights.tolist() == [0, 0, 1, 1, 0]
    assert [field.dtype.name for field in example] == ["int32", "int32", "float32"]
    with pytest.raises(ValueError, match="empty example"):
        supervised.prepend(supervised.shift([], []), [40])


@pytest.mark.data
@pytest.mark.parametrize("load", [corpora.alpaca_en, corpora.alpaca_zh])
def test_real_alpaca_rows_learn_answer_and_end(load):
    rows = load()
    tokenizer = tokenizer_for([row["output"] for _, row in list(rows)[:100]])
    examples, counts = supervised.examples(
        formats.conversations(rows), partial(chat.encode_chat, tokenizer), 1 << 20, "error"
    )
    assert len(examples) == counts.kept == len(rows)
    for (place, row), example in zip(rows, examples, strict=True):
        assert learned(tokenizer, example) == row["output"] + "<|im_end|>", place
    ends = [((e.targets == tokenizer.eos_id) & (e.weights != 0)).sum() for e in examples]
    assert sum(ends) == len(rows)
    assert counts.supervised_tokens == sum(int((e.weights != 0).sum()) for e in examples)


@pytest.mark.data
@pytest.mark.weights
def test_real_rows_with_a_real_tokenizer():
    """SmolLM2's own tokenizer and template, whose pad token is its eos."""
    path = smollm2()
    _, metadata = open_gguf(path)
    tokenizer = tokenizer_of(path, metadata)
    assert tokenizer.pad_id == tokenizer.eos_id
    rows = corpora.alpaca_en()
    examples, _ = supervised.examples(
        formats.conversations(rows), partial(chat.encode_chat, tokenizer), 1 << 20
    )
    for (place, row), example in zip(rows, examples, strict=True):
        assert learned(tokenizer, example) == row["output"] + "<|im_end|>", place
    ends = [((e.targets == tokenizer.eos_id) & (e.weights != 0)).sum() for e in examples]
    assert sum(ends) == len(rows)


@pytest.mark.data
def test_real_tool_use_rows_learn_every_assistant_turn():
    rows = corpora.glaive_en()
    tokenizer = tokenizer_for(["tools search recipe answer\n"], 300)
    talks = list(formats.conversations(rows))[:60]
    examples, _ = supervised.examples(talks, partial(chat.encode_chat, tokenizer), 1 << 20)
    for (place, talk), example in zip(talks, examples, strict=True):
        answers = [m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant"]
        assert learned(tokenizer, example) == "".join(answers), place


@pytest.mark.data
def test_real_loss_weighted_rows():
    talks = list(formats.conversations(corpora.loss_weighted()))
    assert all(talk[-1]["loss_weight"] == 1.0 for _, talk in talks) and len(talks) == 500


def ids_and_mask(n, answer):
    """A fake encoder: n tokens, of which the last `answer` are learned."""
    mask = np.zeros(n, np.float32)
    mask[n - answer :] = 1
    return np.arange(n, dtype=np.int32), mask


TALKS = [("f:1", (6, 2)), ("f:2", (12, 3)), ("f:3", (10, 9)), ("f:4", (4, 0))]


def encode(shape):
    return ids_and_mask(*shape)


def test_truncation_policies_and_their_counts():
    found, counts = supervised.examples(TALKS, encode, 8, "right")
    assert [e.tokens.tolist() for e in found] == [list(range(6)), list(range(8))]
    assert counts == supervised.Counts(
        read=4, kept=2, truncated=1, dropped_unsupervised=2, tokens=14, supervised_tokens=9
    )
    found, counts = supervised.examples(TALKS, encode, 8, "left")
    assert [e.tokens.tolist() for e in found] == [
        list(range(6)),
        list(range(4, 12)),
        list(range(2, 10)),
    ]
    assert (counts.kept, counts.truncated, counts.dropped_unsupervised) == (3, 2, 1)
    found, counts = supervised.examples(TALKS, encode, 8, "drop")
    assert len(found) == 1 and (counts.dropped_long, counts.dropped_unsupervised) == (2, 1)
    with pytest.raises(ValueError, match="f:2: 12 tokens, more than max_length 8"):
        supervised.examples(TALKS, encode, 8, "error")


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"no example has a supervised token.*read=1"):
        supervised.examples(TALKS[3:], encode, 8)
    with pytest.raises(ValueError, match="truncate 'middle'"):
        supervised.examples(TALKS, encode, 8, "middle")


def test_a_template_that_refuses_names_the_place():
    tokenizer = train_bpe(
        ["abc\n"], 300, chat.CHATML_TOKENS, chat_template="{{ raise_exception('no system here') }}"
    )
    talks = [("rows.json:7", [{"role": "system", "content": "x"}])]
    with pytest.raises(ValueError, match=r"^rows\.json:7: .*no system here"):
        supervised.examples(talks, partial(chat.encode_chat, tokenizer), 8)
