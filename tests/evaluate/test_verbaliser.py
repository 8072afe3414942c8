"""Label words on a bigram model, whose probabilities are a table, and trained until they are right."""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.packing import pad
from research.data.source import normalise, supervised_source
from research.evaluate import prompting
from research.evaluate.verbaliser import Verbaliser, label_log_probs
from research.objectives import choose, next_token
from research.train.loop import Training, fit
from research.train.optim import AdamW

LETTERS = "xzyn:w."
V = len(LETTERS)


@dataclass(frozen=True)
class Bigram:
    """log p(next | token) is a table: states are one-hot tokens, the head is the table."""

    config: Any = field(default_factory=lambda: SimpleNamespace(max_length=64), compare=False)

    def apply(self, variables, x, method, **_):
        return jnp.eye(V)[x] if method == "hidden" else x @ variables["params"]["head"]


MODEL = Bigram()
PARAMS = {"head": jax.random.normal(jax.random.key(0), (V, V))}
LOG_P = np.asarray(jax.nn.log_softmax(PARAMS["head"]))
# The words: one token, and two that begin with the same one.
WORDS = Verbaliser(prompting.Template("{question}", "{option}", ":", "."), ("y", "nw", "ny"))


def encode(text):
    return [LETTERS.index(letter) for letter in text]


def by_hand(last):
    """log p of y, nw, ny after `last`, normalised."""
    at = {letter: LOG_P[LETTERS.index(letter)] for letter in (last, "n")}
    y, n, w = (LETTERS.index(letter) for letter in "ynw")
    words = [at[last][y], at[last][n] + at["n"][w], at[last][n] + at["n"][y]]
    return np.array(words) - np.log(np.exp(words).sum())


def test_probabilities_of_labels_by_hand():
    got = label_log_probs(MODEL, PARAMS, encode, WORDS, ["x", "xz", "zx"])
    np.testing.assert_allclose(got, [by_hand("x"), by_hand("z"), by_hand("x")], atol=1e-5)
    shots = [WORDS.ask("z", 1)]
    same = label_log_probs(MODEL, PARAMS, encode, WORDS, ["x"], shots)  # a bigram forgets them
    np.testing.assert_allclose(same, got[:1], atol=1e-5)


def test_only_the_tokens_of_the_word_have_a_loss():
    example = WORDS.example(encode, "xz", 1)
    assert [LETTERS[i] for i in example.tokens] == list("xznw")
    assert example.weights.tolist() == [0, 1, 1, 0]
    assert [LETTERS[i] for i in example.targets[1:3]] == list("nw")
    shot = WORDS.example(encode, "x", 0, [WORDS.ask("z", 1)])
    assert [LETTERS[i] for i in shot.tokens] == list("znw.xy")
    assert shot.weights.tolist() == [0, 0, 0, 0, 1, 0]


def test_choose_is_the_cross_entropy_of_the_labels():
    texts, labels = ["x", "xz", "zzx"], [1, 2, 0]
    batch = normalise(WORDS.candidates(encode, texts, labels, 6))
    loss, metrics = choose(MODEL)(PARAMS, None, batch, None)
    rows = [by_hand(text[-1]) for text in texts]
    own = [row[label] for row, label in zip(rows, labels, strict=True)]
    np.testing.assert_allclose(loss, -np.mean(own), rtol=1e-5)
    hits = [row.argmax() == label for row, label in zip(rows, labels, strict=True)]
    np.testing.assert_allclose(metrics["accuracy"].value, np.mean(hits), rtol=1e-6)
    assert metrics["examples"].total == 3

    def numeric(i, j, eps=1e-2):
        moved = [PARAMS["head"].at[i, j].add(side) for side in (eps, -eps)]
        up, down = (choose(MODEL)({"head": head}, None, batch, None)[0] for head in moved)
        return (up - down) / (2 * eps)

    grad = jax.grad(lambda p: choose(MODEL)(p, None, batch, None)[0])(PARAMS)["head"]
    for i, j in ((0, 2), (1, 3), (3, 5), (3, 2), (0, 6)):
        np.testing.assert_allclose(grad[i, j], numeric(i, j), atol=1e-3)


def test_both_ways_of_training_learn_the_labels():
    """x is `nw`, z is `y`; the other word that begins with n stays behind."""
    texts, labels = ["x", "z"], [1, 0]
    table = WORDS.candidates(encode, texts, labels, 4)
    pairs = zip(texts, labels, strict=True)
    examples = [WORDS.example(encode, text, label) for text, label in pairs]
    ways = {"choose": (choose(MODEL), table), "next": (next_token(MODEL), pad(examples, 4))}
    for name, (objective, rows) in ways.items():
        train = partial(fit, objective, supervised_source(rows, 2, 0), PARAMS, AdamW(0.1))
        fitted = train(Training(steps=40, log_every=None))
        got = label_log_probs(MODEL, fitted.params, encode, WORDS, texts)
        assert got.argmax(1).tolist() == labels, name
        assert np.exp(got.max(1)).min() > 0.8, name


def test_refusals():
    with pytest.raises(ValueError, match="two labels or more"):
        Verbaliser(prompting.Template(), ("yes", "yes"))
    with pytest.raises(ValueError, match="label 3 is not one of 3"):
        WORDS.ask("x", 3)
    with pytest.raises(ValueError, match=r"example 0 has 3 tokens, expected 1\.\.2"):
        WORDS.candidates(encode, ["xzx"], [0], 2)
