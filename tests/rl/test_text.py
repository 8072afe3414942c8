"""Real prompts as a task: what the reward is told, and what is refused."""

import numpy as np
import pytest

from research.rl.tasks import Transcript
from research.rl.text import text_task

PROMPTS = [("one", [5, 6]), ("two", [7, 8, 9]), ("three", [5, 9])]


def task(reward, prompts=PROMPTS, **more):
    return text_task(50, prompts, lambda ids: " ".join(map(str, ids)), reward, 4, (1,), **more)


def test_the_reward_gets_the_question_and_the_answer_without_its_end():
    told = []

    def reward(prompts, answers):
        told.extend(zip(prompts, answers, strict=True))
        return np.arange(len(answers), dtype=np.float32)

    found = [Transcript([7, 8, 9], [3, 4, 1], [1, 1, 1], True), Transcript([5, 6], [], [], False)]
    np.testing.assert_array_equal(task(reward).score(found), [0, 1])
    assert told == [("two", "3 4"), ("one", "")]


def test_rows_hold_the_longest_prompt_and_answer():
    made = task(lambda p, a: np.zeros(len(a)))
    assert made.length == 3 + 4 - 1
    drawn = made.prompts(np.random.default_rng(0), 3)
    assert sorted(drawn) == sorted(ids for _, ids in PROMPTS)  # none twice
    assert task(lambda p, a: a, in_order=True).prompts(None, 2) == [[5, 6], [7, 8, 9]]


def test_what_is_refused():
    with pytest.raises(ValueError, match="same ids"):
        task(lambda p, a: a, [*PROMPTS, ("four", [5, 6])])
    with pytest.raises(ValueError, match="4 prompts are asked for and there are 3"):
        task(lambda p, a: a).prompts(np.random.default_rng(0), 4)
    with pytest.raises(ValueError, match="nan"):
        task(lambda p, a: np.full(len(a), np.nan)).score([Transcript([5, 6], [1], [1], True)])
