"""Searching for translations: against the full forward pass, and against every sequence there is."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode.beam import Beams
from research.decode.prompts import PromptError
from research.decode.translate import translate
from research.models import seq2seq
from research.models.additive import Learned
from research.models.families.transformer import transformer
from research.weights import prompt

BOS, EOS, V = 1, 2, 7
CONFIG = transformer(V, 2, 16, 2, 24, dropout=0.0, position=Learned(64, 2.0), max_length=64)
MODEL = seq2seq.Seq2Seq(CONFIG)
SOURCES = [[3, 5, 4, 6, EOS], [6, EOS], [4, 4, 3, EOS]]


@pytest.fixture(scope="module")
def params():
    fresh = seq2seq.init(MODEL, jax.random.key(0))
    return jax.tree.map(lambda w: w * 1.5 if w.ndim == 3 else w, fresh)


@jax.jit
def log_probs(params, source, tokens):
    return jax.nn.log_softmax(MODEL.apply({"params": params}, source, tokens))


def score(params, source, target):
    """Σ log p of a target, by one full forward pass."""
    rows = log_probs(params, jnp.array([source]), jnp.array([[BOS, *target[:-1]]]))[0]
    return float(sum(row[token] for row, token in zip(rows, target, strict=True)))


def greedy(params, source, most):
    """The likeliest token again and again, each by a full forward pass over `most` places."""
    said = []
    while len(said) < most and EOS not in said:
        row = np.full((1, most), EOS)
        row[0, : len(said) + 1] = [BOS, *said]
        said.append(int(log_probs(params, jnp.array([source]), row)[0, len(said)].argmax()))
    return said


def test_one_beam_is_greedy_search(params):
    search = Beams(1, max_tokens=6, stop_ids=(EOS,))
    found = translate(MODEL, params, SOURCES, BOS, search)
    wanted = [greedy(params, source, 6) for source in SOURCES]
    assert found.rows() == wanted
    sums = [score(params, *pair) / len(pair[1]) for pair in zip(SOURCES, wanted, strict=True)]
    np.testing.assert_allclose(found.scores[:, 0], sums, atol=1e-5)
    assert len({tuple(row) for row in wanted}) > 1


def test_enough_beams_find_the_best_of_all_targets(params):
    """Of at most three tokens there are 1 + 6 + 6 * 6 * 7 targets; no beam is ever cut off."""
    most, source = 3, SOURCES[0]
    bodies = [b for n in range(most) for b in itertools.product(set(range(V)) - {EOS}, repeat=n)]
    targets = [[*body, EOS] for body in bodies]
    targets += [[*b, last] for b in bodies if len(b) == most - 1 for last in set(range(V)) - {EOS}]
    assert len(targets) == 1 + 6 + 6 * 6 * 7
    scores = {tuple(t): score(params, source, t) / len(t) ** 0.6 for t in targets}
    best = sorted(scores, key=scores.get, reverse=True)[:3]
    search = Beams(60, 0.6, early_stopping="never", n_best=3, max_tokens=most, stop_ids=(EOS,))
    found = translate(MODEL, params, [source], BOS, search)
    rows = [tuple(row[:n]) for row, n in zip(found.tokens[0], found.lengths[0], strict=True)]
    assert rows == best
    np.testing.assert_allclose(found.scores[0], [scores[row] for row in best], atol=1e-5)


def test_what_is_found_does_not_depend_on_the_sources_beside_it(params):
    search = partial(translate, MODEL, params, bos_id=BOS, search=Beams(3, max_tokens=5))
    together = search(SOURCES)
    for number, source in enumerate(SOURCES):
        alone = search([source])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[number])
        np.testing.assert_allclose(alone.scores[0], together.scores[number], atol=1e-5)


def test_bad_sources_are_named(params):
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        translate(MODEL, params, [[3], []], BOS)
    with pytest.raises(PromptError, match="prompt 0 holds token id 7"):
        translate(MODEL, params, [[7]], BOS)
    with pytest.raises(PromptError, match="max_tokens is 64"):
        translate(MODEL, params, [[3]], BOS, Beams(1, max_tokens=64))


def test_a_source_may_begin_with_a_learned_prompt(params):
    """Greedily, and against the forward pass; a model without it refuses."""
    tuned = prompt.add(params, jax.random.key(1), 3, prompt.normal)
    source = prompt.before(tuned, SOURCES)[0]
    assert source == [V, V + 1, V + 2, *SOURCES[0]]
    found = translate(MODEL, tuned, [source], BOS, Beams(beams=1, max_tokens=5, stop_ids=(EOS,)))
    assert found.rows() == [greedy(tuned, source, 5)]
    with pytest.raises(PromptError, match=r"prompt 0 holds token id 9; ids are 0\.\.6"):
        translate(MODEL, params, [source], BOS)
