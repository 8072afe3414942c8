"""Rows of headlines, and an accuracy counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shared import headline_classes, sarcasm
from research.data.corpora import Headline
from research.models import decoder
from research.models.families.llama import llama


def letters(text):
    return [1 + ord(letter) % 30 for letter in text]


def test_rows_have_a_label_and_long_headlines_end():
    found = headline_classes.rows(letters, [Headline("abc", True), Headline("abcdef", False)], 4)
    assert found["labels"].tolist() == [1, 0]
    assert found["segment_ids"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert found["tokens"][1].tolist() == letters("abcd")


@pytest.mark.data
def test_the_test_headlines_are_those_of_sarcasm_and_none_is_trained_on():
    train, test = headline_classes.split(30, 20)
    assert len(train) == 30 and len(test) == 20 and not set(train) & set(test)
    longer, same = headline_classes.split(60, 20)
    assert same == test and longer[:30] == train

    class Letters:
        def encode(self, text):
            labels = {word: [n] for n, word in enumerate(sarcasm.LABELS, start=1)}
            return labels.get(text) or [3 + ord(letter) % 90 for letter in text]

    data = sarcasm.read(Letters(), train=30, test=20, length=300)
    first = data.test["targets"][data.test["weights"] != 0]
    assert sorted(first) == sorted(1 + headline.sarcastic for headline in test)


def test_accuracy_counts_every_headline_once():
    model = decoder.Decoder(llama(32, 1, 8, 2, 1, 8, tied=True))
    params = headline_classes.with_head(model, decoder.init(model, jax.random.key(0)), seed=0)
    words = ("ab", "cde", "fgh", "a", "bd", "xy", "zzz")
    table = headline_classes.rows(letters, [Headline(word, True) for word in words], 4)
    said = []
    for word in words:  # one at a time, without padding
        states = model.apply({"params": params}, jnp.array([letters(word)]), method="hidden")
        said.append(int((states[0].mean(0) @ params["score"]["kernel"]).argmax()))
    assert 0 < sum(said) < len(said)
    found = headline_classes.accuracy(model, params, table, rows=3)
    assert found == pytest.approx(np.mean(said))
