"""Multiple choice on a hand-made model whose next-token probabilities are known."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from research.evaluate.choice import Proportion, Question, multiple_choice, question, wilson


@dataclass(frozen=True)
class Bigram:
    """log p(next | token) is a table: hidden states are one-hot tokens, the head is the table."""

    config: Any = field(default_factory=lambda: SimpleNamespace(max_length=64), compare=False)

    def apply(self, variables, x, method, **_):
        if method == "hidden":
            return jnp.eye(6)[x]
        return x @ variables["params"]["head"]


# p(next | current), tokens 0..5
TABLE = np.full((6, 6), 0.02)
TABLE[0, 1], TABLE[0, 2], TABLE[0, 3] = 0.5, 0.3, 0.12
TABLE[1, 4] = TABLE[2, 5] = TABLE[5, 5] = 0.9
TABLE /= TABLE.sum(1, keepdims=True)
PARAMS = {"head": jnp.log(jnp.asarray(TABLE, jnp.float32))}


def test_scores_and_normalisations():
    """Option (1,): p .5; option (2, 5, 5): p .3 * .9 * .9, less by sum, more by token."""
    q = Question(((0, 1), (0, 2, 5, 5)), (1, 1), (1, 9), answer=1)
    result = multiple_choice(Bigram(), PARAMS, [q, q, q], batch_size=4)
    p = [TABLE[0, 1], TABLE[0, 2] * TABLE[2, 5] * TABLE[5, 5]]
    np.testing.assert_allclose(result.log_probs[2], np.log(p), rtol=1e-5)
    assert result.answers["raw"] == (0, 0, 0) and result.raw.value == 0
    assert result.answers["per_token"] == (1, 1, 1) and result.per_token.value == 1
    assert result.answers["per_byte"] == (1, 1, 1)


def test_only_the_option_is_scored():
    """The prompt's own improbable tokens count for nothing."""
    q = Question(((4, 3, 0, 3), (4, 3, 0, 1)), (3, 3), (1, 1), answer=1)
    result = multiple_choice(Bigram(), PARAMS, [q])
    np.testing.assert_allclose(result.log_probs[0], np.log(TABLE[0, [3, 1]]), rtol=1e-5)
    assert result.raw == Proportion(1, 1)


MERGES = {"a": 0, "b": 1, " ": 2, " b": 3, "ab": 4}


def encode(text):
    """Greedy longest match."""
    ids = []
    while text:
        piece = next(p for p in (" b", "ab", text[0]) if text.startswith(p))
        ids.append(MERGES[piece])
        text = text[len(piece) :]
    return ids


def test_question_finds_where_an_option_begins():
    q = question(encode, "b", [" b", "a"], 0)
    assert q.sequences == ((1, 3), (1, 0)) and q.starts == (1, 1) and q.bytes == (2, 1)
    merged = question(encode, "ba", ["b", "a"], 1)  # 'ba' + 'b' is b, ab: the a is merged away
    assert merged.sequences == ((1, 4), (1, 0, 0)) and merged.starts == (1, 2)


def test_errors():
    for arguments, message in [
        (("b", ["a"], 1), "answer 1 is not one of 1"),
        (("", ["a"], 0), "prompt has no tokens"),
        (("b", ["a", ""], 0), "option 1 .* adds no token"),
    ]:
        with pytest.raises(ValueError, match=message):
            question(encode, *arguments)
    with pytest.raises(ValueError, match="no questions"):
        multiple_choice(Bigram(), PARAMS, [])


def test_wilson_by_hand():
    """8 of 10: the interval of Wilson (1927) is 0.490 to 0.943; the ends stay within 0 and 1."""
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.16113), abs=1e-5)
    assert wilson(20, 20)[1] == 1
    with pytest.raises(ValueError, match="total > 0"):
        wilson(0, 0)
