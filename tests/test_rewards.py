"""Rules by hand, a learned reward against one text at a time, and what is refused."""

from decimal import Decimal

import jax
import numpy as np
import pytest

from research import rewards
from research.models import decoder, heads
from research.models.families.llama import llama
from research.objectives import head_outputs

ASKED = ["2+2?", "2+2?", "2+2?"]


def scores(reward, *answers):
    return reward(["2+2?"] * len(answers), answers).tolist()


def test_rules_by_hand():
    assert scores(rewards.length(4), "1234", "", "123456") == [0, -1, -0.5]
    assert scores(rewards.length(2, lambda text: len(text.split())), "a b", "a") == [0, -0.5]
    assert scores(rewards.matches(r"<b>.+</b>"), " <b>x\ny</b>\n", "<b></b>", "a <b>x</b>") == [
        1,
        0,
        0,
    ]
    assert scores(rewards.distinct_words(), "A a b c", "", "x") == [0.75, 0, 1]
    np.testing.assert_allclose(
        scores(rewards.repetition(2), "a b a b", "a b c", "a", ""), [-1 / 3, 0, 0, 0], rtol=1e-6
    )


def test_the_right_answer():
    by_number = rewards.correct({"2+2?": "#### 4"}, rewards.last_number)
    assert scores(by_number, "3 + 1 is 4.00.", "4, no: 5", "four") == [1, 0, 0]
    by_text = rewards.correct({"2+2?": "The Four!"})
    assert scores(by_text, "four", "Four.", "4") == [1, 1, 0]
    assert rewards.last_number("from 3 to -1,234.5") == Decimal("-1234.5")
    assert rewards.last_number("none") is None
    with pytest.raises(KeyError, match="no true answer is known for the prompt '3\\?'"):
        by_text(["3?"], ["3"])
    with pytest.raises(ValueError, match="no answer can be read from 'four', of '2\\+2\\?'"):
        rewards.correct({"2+2?": "four"}, rewards.last_number)


MODEL = decoder.Decoder(llama(40, 1, 16, 2, 1, 32, head_size=8, tied=True, init_std=0.4))
HEAD = heads.Head(1, init_std=1.0)


@pytest.fixture(scope="module")
def params():
    plain = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
    return heads.add(plain, HEAD, 16, jax.random.key(1))


def encode(prompt, answer):
    return [ord(c) % 40 for c in prompt + answer]


def test_a_learned_reward_is_that_of_each_text_alone(params):
    reward = rewards.learned(MODEL, params, encode, HEAD, max_length=24, rows=2)
    before = rewards._scored._cache_size()
    answers = ["a", "bc" * 9, "", "dd", "e" * 60]
    found = reward(["2+2?"] * 5, answers)
    assert found.shape == (5,) and found.dtype == np.float32
    for answer, score in zip(answers, found, strict=True):
        ids = np.array([encode("2+2?", answer)[:24]])
        alone = head_outputs(MODEL, HEAD, params, {"tokens": ids})
        np.testing.assert_allclose(score, alone[0, 0], rtol=1e-4, atol=1e-5)
    reward(["x", "y"], ["longer" * 3, "texts" * 4])
    assert rewards._scored._cache_size() - before == 2  # widths 16 and 24
    assert reward([], []).shape == (0,)


def test_learned_rewards_refuse(params):
    for wrong in ({"head": heads.Head(2)}, {"rows": 0}, {"max_length": 10**9}):
        with pytest.raises(ValueError, match="a reward needs 1 output"):
            rewards.learned(MODEL, params, encode, **wrong)
    with pytest.raises(ValueError, match="answer 1 and its prompt have no tokens"):
        rewards.learned(MODEL, params, encode, HEAD, 24)(["a", ""], ["b", ""])


def constant(*values):
    return lambda prompts, answers: np.array(values, np.float32)


def test_of_several_rewards():
    parts = [constant(1, 0, 4), constant(3, 0, 0)]
    ask = lambda reward: reward(ASKED, ["a", "b", "c"]).tolist()  # noqa: E731
    assert ask(rewards.ensemble(parts)) == [2, 0, 2]
    assert ask(rewards.ensemble(parts, "min")) == [1, 0, 0]
    assert ask(rewards.ensemble(parts, "uncertainty-penalised", 0.5)) == [1.5, 0, 0]
    assert ask(rewards.weighted(parts, [1, -1])) == [-2, 0, 4]
    assert ask(rewards.normalised(parts[0], 1.0, 2.0)) == [0, -0.5, 1.5]
    for wrong, message in (
        (lambda: rewards.ensemble([]), "at least one reward"),
        (lambda: rewards.ensemble(parts, "median"), "how 'median'; expected one of"),
        (lambda: rewards.weighted(parts, [1]), "2 rewards but 1 weights"),
        (lambda: rewards.normalised(parts[0], 0, 0), "std above 0"),
        (lambda: rewards.length(0), "must be above 0, not 0"),
        (lambda: rewards.matches("("), "'\\(' is no regular expression"),
        (lambda: rewards.repetition(0), "n must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_checked_reward_names_the_answer():
    safe = rewards.checked(constant(1, np.nan, np.inf))
    with pytest.raises(ValueError, match="the reward of answer 1, 'b', is nan"):
        safe(ASKED, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"gave float32 \(2,\); expected numbers \(3,\)"):
        rewards.checked(constant(1, 2))(ASKED, ["a", "b", "c"])
    with pytest.raises(ValueError, match="expected numbers"):
        rewards.checked(lambda p, a: [None])(["a"], ["b"])
    with pytest.raises(ValueError, match="3 prompts but 1 answers"):
        safe(ASKED, ["a"])
    found = rewards.checked(lambda p, a: [1, 2, True])(ASKED, ["a", "b", "c"])
    assert found.dtype == np.float32 and found.tolist() == [1, 2, 1]
