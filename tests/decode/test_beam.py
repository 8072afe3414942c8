"""Beam search against all sequences there are, and against a slow form in plain Python."""

import itertools

import jax
import numpy as np
import pytest
from tiny_decoder import every_sequence, make

from research.decode import Beams, PromptError, Sampling, beam_search, generate

V, PROMPTS = 5, [[1, 2, 3], [4], [0, 3, 3, 1, 2, 2, 4]]


@pytest.fixture(scope="module")
def tiny():
    return make(V, seed=3, scale=4.0)


def slow(log_probs, prompt, search):
    """[(score, ids)], best first, of one prompt: lists, sorted."""
    running, done, n = [(0.0, ())], [], 0
    while True:
        n += 1
        grown = []
        for score, ids in running:
            row = log_probs([[*prompt, *ids]])[0, -1]
            grown += [(score + row[token], (*ids, token)) for token in range(V)]
        grown = sorted(grown, reverse=True)[: search.width]
        ends = [ids[-1] in search.stop_ids or n == search.max_tokens for _, ids in grown]
        full = len(done) == search.beams
        for (score, ids), end in list(zip(grown, ends, strict=True))[: search.beams]:
            if end and not (search.early_stopping is True and full):
                done.append((score / n**search.length_penalty, ids))
        done = sorted(done, reverse=True)[: search.beams]
        running = [one for one, end in zip(grown, ends, strict=True) if not end][: search.beams]
        if n == search.max_tokens or not running:
            return done
        if len(done) == search.beams:
            far = search.early_stopping == "never" and search.length_penalty > 0
            length = search.max_tokens if far else n
            best = running[0][0] / length**search.length_penalty
            if search.early_stopping is True or best <= done[-1][0]:
                return done


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_equals_a_slow_form(tiny, early, alpha):
    """Ragged prompts in one batch, one by one there; all sequences that are kept, in order."""
    model, params, log_probs = tiny
    search = Beams(3, alpha, early, n_best=3, max_tokens=6, stop_ids=(2, 4))
    found = beam_search(model, params, PROMPTS, search, pad_id=1)
    for row, prompt in enumerate(PROMPTS):
        expected = slow(log_probs, prompt, search)
        assert len(expected) == 3
        for place, (score, ids) in enumerate(expected):
            length = found.lengths[row, place]
            assert tuple(found.tokens[row, place, :length]) == ids
            assert (found.tokens[row, place, length:] == 1).all()
            assert found.scores[row, place] == pytest.approx(score, abs=2e-4)


@pytest.mark.parametrize("stops", [(), (2,)])
def test_enough_beams_find_the_best_of_all_sequences(tiny, stops):
    """V³ beams: nothing is ever dropped, so the result is every sequence, sorted."""
    model, params, log_probs = tiny
    search = Beams(V**3, 0.7, max_tokens=3, stop_ids=stops, n_best=V**3)
    found = beam_search(model, params, PROMPTS[:1], search)
    scored = every_sequence(log_probs, PROMPTS[0], V, 3, stops)
    expected = sorted(((s / len(ids) ** 0.7, ids) for ids, s in scored.items()), reverse=True)
    np.testing.assert_allclose(
        found.scores[0, : len(expected)], [score for score, _ in expected], atol=2e-4
    )
    assert tuple(found.rows()[0]) == expected[0][1]
    ids = {
        tuple(row[:n].tolist()) for row, n in zip(found.tokens[0], found.lengths[0], strict=True)
    }
    assert ids - {()} == set(scored)
    beyond = found.scores[0, len(expected) :]
    assert np.isneginf(beyond).all() and not found.lengths[0, len(expected) :].any()


@pytest.mark.parametrize("stops", [(), (2, 4)])
def test_one_beam_is_greedy(tiny, stops):
    model, params, _ = tiny
    sampling = Sampling(temperature=0, max_tokens=9, stop_ids=stops)
    greedy = generate(model, params, PROMPTS, jax.random.key(0), sampling)
    one = beam_search(model, params, PROMPTS, Beams(1, max_tokens=9, stop_ids=stops))
    assert one.rows() == greedy.rows()
    means = greedy.log_probs.sum(1) / greedy.lengths
    np.testing.assert_allclose(one.scores[:, 0], means, atol=1e-4)


def test_no_repeated_ngrams(tiny):
    model, params, _ = tiny
    search = Beams(3, no_repeat_ngram=2, n_best=3, max_tokens=8)
    found = beam_search(model, params, PROMPTS, search)
    for prompt, rows in zip(PROMPTS, found.tokens, strict=True):
        for row in rows:
            ids = [*prompt, *row.tolist()]
            # A pair that the prompt itself repeats is none of ours.
            new = list(itertools.pairwise(ids))[len(prompt) - 1 :]
            old = list(itertools.pairwise(prompt))
            assert len(set(new)) == len(new) and not set(new) & set(old)
    free = beam_search(model, params, PROMPTS, Beams(3, n_best=3, max_tokens=8))
    assert not np.array_equal(free.tokens, found.tokens)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"n_best": 5}, "n_best is 5, more than the 4 beams"),
        ({"early_stopping": "soon"}, "early_stopping must be True, False or 'never', got 'soon'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be at least 1"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Beams(**wrong)


def test_what_does_not_fit_the_vocabulary_or_the_context(tiny):
    model, params, _ = tiny
    with pytest.raises(ValueError, match="6 beams, but only 5 sequences of 1 tokens"):
        beam_search(model, params, PROMPTS, Beams(6, max_tokens=1))
    with pytest.raises(ValueError, match="5 stop ids leave too little of a vocabulary of 5"):
        beam_search(model, params, PROMPTS, Beams(2, max_tokens=4, stop_ids=tuple(range(5))))
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        beam_search(model, params, [[1], []], Beams(2, max_tokens=4))
