"""Few-shot prompts, PMI and calibration on hand-made numbers and a bigram model."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from research.evaluate.prompting import (
    Template,
    accuracy,
    calibrated,
    examine,
    option_log_probs,
    pmi,
    shots,
    split,
)


class Question(NamedTuple):
    question: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Bigram:
    """log p(next | character) is a table: hidden states are one-hot tokens, the head is the table."""

    config: Any = field(default_factory=lambda: SimpleNamespace(max_length=64), compare=False)

    def apply(self, variables, x, method, **_):
        return jnp.eye(6)[x] if method == "hidden" else x @ variables["params"]["head"]


LETTERS = "xyn:#."
TABLE = np.full((6, 6), 0.1)
TABLE[0, 1:3] = 0.30, 0.20  # x: y before n
TABLE[3, 1:3] = 0.40, 0.10  # so after a colon, more so
TABLE[4, 1:3] = 0.35, 0.15
TABLE /= TABLE.sum(1, keepdims=True)
PARAMS = {"head": jnp.log(jnp.asarray(TABLE, jnp.float32))}
TEMPLATE = Template("{question}", "{option}", ":", ".")


def encode(text):
    return [LETTERS.index(letter) for letter in text]


def test_prompts():
    solved = [Question("Is ice cold?", ("yes", "no"), 0), Question("Is fire?", ("yes", "no"), 1)]
    assert Template().prompt("Is snow?", solved) == (
        "Question: Is ice cold?\nAnswer: yes\n\nQuestion: Is fire?\nAnswer: no\n\n"
        "Question: Is snow?\nAnswer:"
    )
    assert Template().prompt("{option} {question}?") == "Question: {option} {question}?\nAnswer:"
    assert Template().options(solved[0]) == [" yes", " no"]
    with pytest.raises(ValueError, match=r"template: option must hold \{option\}, got ' x'"):
        Template(option=" x")


def test_split_and_shots_are_the_same_for_a_seed():
    questions = [Question(str(i % 18), ("a", "b"), 0) for i in range(20)]  # two texts come twice
    train, test = split(questions, 6, seed=3)
    assert len(test) == 6 and not {q.question for q in test} & {q.question for q in train}
    assert (train, test) == split(questions, 6, seed=3) != split(questions, 6, seed=4)
    few = shots(train, 4, seed=1)
    assert few == shots(train, 4, seed=1) != shots(train, 4, seed=2)
    assert few == shots(train, 8, seed=1)[:4] and len(set(few)) == 4
    assert shots(train, 0, seed=1) == []
    with pytest.raises(ValueError, match=r"held_out must be in 1..19, got 20"):
        split(questions, 20, seed=0)
    with pytest.raises(ValueError, match="asked for 3 examples of a pool of 2"):
        shots(questions[:2], 3, seed=0)


def test_scores_of_a_known_model():
    """The same prompt twice is scored once and given twice."""
    questions = [Question("x", ("y", "n"), 0), Question("#", ("y", "n"), 1)] * 2
    found = option_log_probs(
        Bigram(), PARAMS, encode, TEMPLATE, [q.question for q in questions], questions
    )
    for row, q in zip(found, questions, strict=True):
        np.testing.assert_allclose(row, np.log(TABLE[LETTERS.index(q.question), 1:3]), rtol=1e-5)


def test_corrections_take_out_what_is_favoured_anyway():
    """After x, y is likelier than n; but after a colon it is much likelier, so x speaks for n."""
    questions = [Question("x", ("y", "n"), 1)]
    found = examine(Bigram(), PARAMS, encode, TEMPLATE, questions, content_free=(":", "#"))
    assert {name: p.correct for name, p in found.items()} == {
        "raw": 0, "per_byte": 0, "pmi": 1, "calibrated": 1,
    }  # fmt: skip


def test_calibration_by_hand():
    """p = (.6, .3) -> (2/3, 1/3); p_cf = mean of (.8, .2) and (.6, .4) = (.7, .3)."""
    free = np.log([[0.4, 0.1], [0.6, 0.4]])
    q = np.array([2 / 3 / 0.7, 1 / 3 / 0.3])
    found = calibrated(np.log([0.6, 0.3]), free)
    np.testing.assert_allclose(np.exp(found), q / q.sum())
    assert found.argmax() == 1


def test_limits():
    """A content-free answer without preference changes nothing but the sum; one's own makes all
    equal; PMI with the prompt itself is 0."""
    log_p = np.log([0.2, 0.5, 0.1])
    np.testing.assert_allclose(np.exp(calibrated(log_p, np.zeros((2, 3)))), [0.25, 0.625, 0.125])
    np.testing.assert_allclose(np.exp(calibrated(log_p, log_p[None])), [1 / 3] * 3)
    assert pmi(log_p, log_p).tolist() == [0, 0, 0]
    questions = [Question("", ("a", "b", "c"), 1), Question("", ("a", "b", "c"), 2)]
    assert accuracy([log_p, log_p], questions).correct == 1
