"""Both forms of a headline for a language model, read back as text."""

import dataclasses

import numpy as np
import pytest

from experiments.shared import headline_forms, sarcasm
from experiments.shared.headline_forms import ANSWERS, INSTRUCTION, chat_answers, label_words
from research.data.corpora import Headline, Question
from research.hub.download import smollm2
from research.hub.gguf import open_gguf
from research.hub.gguf_tokenizer import tokenizer_of

TRAIN = [Headline("area man wins", True), Headline("senate votes on a bill", False)]
TEST = [*TRAIN, Headline("area cat sleeps", True)]
ASKED = [Question("Which is hotter?", ("ice", "steam"), 1)]


@pytest.fixture(scope="module")
def tokenizer():
    path = smollm2()
    return tokenizer_of(path, open_gguf(path)[1])


def supervised(tokenizer, table):
    """The text before each supervised run of tokens, and the run itself."""
    for tokens, targets, weights in zip(
        table["tokens"], table["targets"], table["weights"], strict=True
    ):
        places = np.flatnonzero(weights)
        before = tokenizer.decode(tokens[: places[0] + 1], skip_special=False)
        yield before, tokenizer.decode(targets[places], skip_special=False)


@pytest.mark.weights
def test_label_words_stand_after_the_pattern(tokenizer):
    task = label_words(tokenizer, TRAIN, TEST, ASKED)
    assert list(supervised(tokenizer, task.train)) == [
        ("area man wins\nSarcastic? Answer:", " yes"),
        ("senate votes on a bill\nSarcastic? Answer:", " no"),
    ]
    assert [tokenizer.decode([id]) for id in task.labels] == list(sarcasm.LABELS)
    (other,) = task.other
    assert tokenizer.decode(other.sequences[1]) == "Question: Which is hotter?\nAnswer: steam"
    assert other.answer == 1


@pytest.mark.weights
def test_a_chat_asks_in_the_models_template_and_the_answer_ends_its_turn(tokenizer):
    task = chat_answers(tokenizer, TRAIN, TEST, ASKED)
    prompt = (
        f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\narea man wins<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert next(supervised(tokenizer, task.train)) == (prompt, "yes<|im_end|>")
    (other,) = task.other
    ids, start = other.sequences[1], other.starts[1]
    assert tokenizer.decode(ids[start:]) == "steam"
    assert tokenizer.decode(ids[:start], skip_special=False).endswith("<|im_start|>assistant\n")


@pytest.mark.weights
@pytest.mark.parametrize("form", [label_words, chat_answers])
def test_a_test_row_asks_for_one_word_a_headline(tokenizer, form):
    task = form(tokenizer, [], TEST, ASKED)
    assert task.train is None
    asked = task.test["targets"][task.test["weights"] != 0]
    assert sorted(asked) == sorted(task.labels[headline.sarcastic] for headline in TEST)


def test_words_of_several_tokens_are_refused():
    with pytest.raises(ValueError, match="one token each"):
        headline_forms._task([], [], [[1], [2, 3]], [])


def test_nats_of_the_right_option_among_two(monkeypatch):
    @dataclasses.dataclass
    class Found:
        raw = dataclasses.make_dataclass("Raw", ["value"])(0.5)
        log_probs = ((np.log(0.1), np.log(0.3)), (np.log(0.2), np.log(0.2)))

    question = dataclasses.make_dataclass("Asked", ["answer"])
    monkeypatch.setattr(headline_forms.choice, "multiple_choice", lambda *_: Found())
    found = headline_forms.other_task(None, None, [question(1), question(0)])
    assert found["other_nll"] == pytest.approx(-(np.log(0.75) + np.log(0.5)) / 2)


def test_answers_are_in_the_order_of_the_labels():
    assert [word.strip() for word in sarcasm.LABELS] == list(ANSWERS) == ["no", "yes"]
