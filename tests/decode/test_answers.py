"""Choice among given answers, against every answer scored one by one."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny_decoder import below_chi_square, make

from research.decode import Sampling, generate, trie_of
from research.evaluate.choice import answer_log_probs

V, PROMPTS, END = 8, [[1, 2, 3], [4, 4]], 7
ANSWERS = [[0, 1, END], [0, 1, 2, END], [0, 3, END], [5, END], [6, 6, 6, 6, END]]


@pytest.fixture(scope="module")
def tiny():
    return make(V, seed=2, scale=3.0)


def by_steps(log_probs, prompt):
    """{answer: Π p(token) / p(allowed tokens)} and the greedy answer, by walking over the list."""
    found, greedy = {}, ()
    for answer in ANSWERS:
        total = 1.0
        for i, token in enumerate(answer):
            row = np.exp(log_probs([[*prompt, *answer[:i]]])[0, -1])
            allowed = {other[i] for other in ANSWERS if other[:i] == answer[:i]}
            total *= row[token] / sum(row[t] for t in allowed)
        found[tuple(answer)] = total
    while list(greedy) not in ANSWERS:
        row = log_probs([[*prompt, *greedy]])[0, -1]
        n = len(greedy)
        allowed = {other[n] for other in ANSWERS if tuple(other[:n]) == greedy}
        greedy = (*greedy, max(allowed, key=lambda t: row[t]))
    return found, greedy


def test_greedy_and_sampled_answers(tiny):
    """Greedy as the walk has it; 3000 samples by chi-square against the product of steps."""
    model, params, log_probs = tiny
    trie, rng = trie_of(ANSWERS), jax.random.key(5)
    run = partial(generate, model, params, among=trie)
    greedy = run(PROMPTS, rng, Sampling(temperature=0, max_tokens=6)).rows()
    assert greedy == [list(by_steps(log_probs, prompt)[1]) for prompt in PROMPTS]
    said = run([PROMPTS[0]] * 3000, rng, Sampling(max_tokens=6)).rows()
    counts = [said.count(answer) for answer in ANSWERS]
    assert sum(counts) == 3000
    expected = by_steps(log_probs, PROMPTS[0])[0]
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    assert below_chi_square(counts, [3000 * expected[tuple(answer)] for answer in ANSWERS])


def test_log_probs_are_of_the_model_unconstrained(tiny):
    model, params, _ = tiny
    sampling = Sampling(temperature=0, max_tokens=5)
    found = generate(model, params, PROMPTS, jax.random.key(0), sampling, among=trie_of(ANSWERS))
    for prompt, answer, values in zip(PROMPTS, found.rows(), found.log_probs, strict=True):
        exact = answer_log_probs(model, params, prompt, [answer])
        assert values.sum() == pytest.approx(exact[0], abs=1e-3)


def test_scores_of_whole_answers(tiny):
    model, params, log_probs = tiny
    found = answer_log_probs(model, params, PROMPTS[0], ANSWERS)
    for value, answer in zip(found, ANSWERS, strict=True):
        rows = log_probs([[*PROMPTS[0], *answer]])[0, len(PROMPTS[0]) - 1 : -1]
        assert value == pytest.approx(rows[np.arange(len(answer)), answer].sum(), abs=1e-3)


def test_a_trie_by_hand():
    trie = trie_of([[4, 1], [4, 2], [3]])
    assert trie.tokens.tolist() == [[4, 3], [1, 2], [-1, -1], [-1, -1], [-1, -1]]
    assert trie.children.tolist() == [[1, 4], [2, 3], [-1, -1], [-1, -1], [-1, -1]]
    nodes = np.array([0, 1, 4])
    kept = np.isfinite(trie.keep(np.zeros((3, 5), np.float32), nodes))
    assert [np.flatnonzero(row).tolist() for row in kept] == [[3, 4], [1, 2], [0, 1, 2, 3, 4]]
    assert trie.follow(nodes, np.array([3, 2, 0])).tolist() == [4, 3, 4]
    assert trie.complete(nodes).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "answers,message",
    [
        ([], "no answers"),
        ([[1], []], "answer 1 is empty"),
        ([[1, -2]], "answer 0 holds token id -2"),
        ([[1], [1, 2]], "answer 1 begins with another answer"),
        ([[1, 2], [1]], "answer 1 is, or begins, another answer"),
        ([[1, 2], [1, 2]], "answer 1 is, or begins, another answer"),
    ],
)
def test_bad_answers(answers, message):
    with pytest.raises(ValueError, match=message):
        trie_of(answers)


def test_answers_that_do_not_fit(tiny):
    run = partial(generate, *tiny[:2], PROMPTS, jax.random.key(0))
    with pytest.raises(ValueError, match=r"the answers hold token id 9; ids are 0..7"):
        run(Sampling(max_tokens=4), among=trie_of([[9]]))
    with pytest.raises(ValueError, match="longest answer has 5 tokens, max_tokens is 4"):
        run(Sampling(max_tokens=4), among=trie_of(ANSWERS))
    token = ANSWERS[0][0]
    with pytest.raises(ValueError, match=rf"banned_ids \[{token}\] are tokens of the answers"):
        run(Sampling(max_tokens=9, banned_ids=(token,)), among=trie_of(ANSWERS))
    with pytest.raises(
        ValueError, match="forced_ids and answers to choose among exclude each other"
    ):
        run(Sampling(max_tokens=9, forced_ids=(token,)), among=trie_of(ANSWERS))
