"""The training that experiments share, on a text made up here."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from experiments.shared import small_lm
from research.models import decoder
from research.models.families.llama import llama
from research.objectives import next_token
from research.train.directory import OtherRunError

CONFIG = llama(300, 1, 16, 2, 1, 24, max_length=64, tied=True)


def texts() -> list[str]:
    words = np.random.default_rng(0).choice(["sun", "moon", "star", "and", "the", "sky\n"], 4000)
    return [" ".join(words[:1500]), " ".join(words[1500:])]


RECIPE = small_lm.Recipe(
    texts,
    vocab_size=300,
    length=16,
    batch_size=4,
    steps=30,
    lr=2e-2,
    eval_lengths=(8, 32),
    eval_tokens=128,
    save_every=20,
)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_RESEARCH_CACHE", str(tmp_path / "cache"))


def test_data_is_made_once_and_split_inside_every_document(cached, monkeypatch):
    made = small_lm.data(RECIPE)
    text = made.tokenizer.decode(made.train[made.train != made.tokenizer.eos_id].tolist())
    assert text == "".join(each[: round(len(each) * 0.9)] for each in texts())
    assert (made.train == made.tokenizer.eos_id).sum() == len(texts())
    monkeypatch.setattr(small_lm, "train_bpe", None)
    again = small_lm.data(RECIPE)
    np.testing.assert_array_equal(again.held_out, made.held_out)
    assert again.tokenizer.encode("the moon") == made.tokenizer.encode("the moon")


def test_every_length_is_of_the_same_tokens(cached):
    data, model = small_lm.data(RECIPE), decoder.Decoder(CONFIG)
    params = decoder.init(model, jax.random.key(0))
    found = small_lm.likelihood(model, params, data, (8, 16, 32), 128)
    assert {each.tokens for each in found.values()} == {128}
    assert len({each.bytes for each in found.values()}) == 1


def test_training_learns_and_ends_where_a_resumed_one_does(cached, tmp_path):
    data = small_lm.data(RECIPE)
    once = small_lm.train(CONFIG, data, RECIPE, tmp_path / "once", 0)
    found = once.metrics()
    assert found["nll/32"] < 3.0 < np.log(300) and found["bits_per_byte/8"] > 0
    assert found["train_tokens_per_s"] > 0
    again = small_lm.train(CONFIG, data, RECIPE, tmp_path / "once", 0)
    jax.tree.map(np.testing.assert_array_equal, again.params, once.params)
    one = dataclasses.replace(RECIPE, steps=1)
    on = small_lm.train(CONFIG, data, one, tmp_path / "on", 0, params=once.params)
    assert on.likelihood[32].per_token < 3.0  # a fresh model is at log(300) after one step


def test_another_loss_is_trained_with_and_plain_likelihood_reported(cached, tmp_path):
    """Smoothing of 1 asks for all tokens alike: the held-out loss ends at log V, not below."""
    data = small_lm.data(RECIPE)
    smooth = partial(next_token, label_smoothing=1.0)
    level = small_lm.train(CONFIG, data, RECIPE, tmp_path / "level", 0, objective=smooth)
    assert level.likelihood[32].per_token == pytest.approx(np.log(300), rel=0.02)
    one = dataclasses.replace(RECIPE, steps=1)
    with pytest.raises(OtherRunError):
        small_lm.train(CONFIG, data, RECIPE, tmp_path / "level", 0)
    small_lm.train(CONFIG, data, one, tmp_path / "plain", 0)
    known = json.loads((tmp_path / "plain/identity.json").read_text())["identity"]
    assert set(known) == {"model", "recipe"}  # as before there was a choice


def test_sizes_that_do_not_fit_are_errors(cached, tmp_path):
    with pytest.raises(ValueError, match=r"eval_lengths \[24\] do not divide the longest, 32"):
        dataclasses.replace(RECIPE, eval_lengths=(24, 32))
    data = small_lm.data(RECIPE)
    other = dataclasses.replace(CONFIG, vocab_size=301)
    with pytest.raises(ValueError, match="vocab_size: model 301, recipe 300"):
        small_lm.train(other, data, RECIPE, tmp_path, 0)
    model = decoder.Decoder(CONFIG)
    params = decoder.init(model, jax.random.key(0))
    with pytest.raises(ValueError, match="held-out tokens hold no window of 8192"):
        small_lm.likelihood(model, params, data, (8192,), 128)
