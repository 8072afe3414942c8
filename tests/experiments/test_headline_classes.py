"""Rows of headlines, and an accuracy counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shared import headline_classes
from research.data import corpora, shuffle
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
def test_the_last_headlines_are_tested_on_and_none_of_them_is_trained_on():
    train, test = headline_classes.split(1280, 400)
    assert len(train) == 1280 and len(test) == 400
    assert not {h.text for h in train} & {h.text for h in test}
    longer, same = headline_classes.split(2000, 400)
    assert same == test and longer[:1280] == train
    headlines = corpora.headlines()
    order = shuffle.permutation(headline_classes.SPLIT_SEED, 0, len(headlines))
    assert test[-1] == headlines[order[-1]] and train[0] == headlines[order[0]]
    with pytest.raises(ValueError, match="30000 and 400 headlines were asked for"):
        headline_classes.split(30_000, 400)


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
