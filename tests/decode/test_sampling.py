"""Filters against slow forms in plain Python, and against Hugging Face's processors."""

import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode.filters import (
    Past,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)
from research.decode.sampling import Filters, Sampling, choose, filtered, log_prob

B, V = 4, 60


@pytest.fixture
def logits(key):
    return np.array(3 * jax.random.normal(key, (B, V)), np.float32)


def softmax(row):
    powers = np.exp(row.astype(np.float64) - row.max())
    return powers / powers.sum()


def whole_past(ids):
    """[B, S] ids, none of them padding."""
    B, S = np.shape(ids)
    return Past(jnp.asarray(ids), jnp.zeros(B, jnp.int32), jnp.full(B, S))


def kept(logits):
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(logits)]


@pytest.mark.parametrize("k", [1, 7, V, V + 5])
def test_top_k(logits, k):
    expected = [set(np.argsort(-row)[:k].tolist()) for row in logits]
    out = keep_top_k(jnp.asarray(logits), k)
    assert kept(out) == expected
    assert np.array_equal(np.where(np.isfinite(out), out, logits), logits)


def test_top_k_keeps_ties():
    assert kept(keep_top_k(jnp.array([[1.0, 3.0, 2.0, 2.0, 0.0]]), 2)) == [{1, 2, 3}]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(logits, p):
    expected = []
    for row in logits:
        probabilities, mass, keep = softmax(row), 0.0, set()
        for token in np.argsort(-row):
            keep.add(int(token))
            mass += probabilities[token]
            if mass >= p:
                break
        expected.append(keep)
    assert kept(keep_top_p(jnp.asarray(logits), p)) == expected


def test_top_p_one_keeps_all_and_ties_are_taken_in_order(logits):
    assert kept(keep_top_p(jnp.asarray(logits), 1.0)) == [set(range(V))] * B
    flat = jnp.zeros((1, 4))
    assert kept(keep_top_p(flat, 0.5)) == [{0, 1}]
    assert kept(keep_top_p(flat, 0.51)) == [{0, 1, 2}]
    peaked = jnp.log(jnp.array([[0.1, 0.4, 0.1, 0.1, 0.3]]))
    assert kept(keep_top_p(peaked, 0.75)) == [{0, 1, 4}]


def test_top_p_after_other_filters_ignores_what_is_removed(logits):
    both = keep_top_p(keep_top_k(jnp.asarray(logits), 3), 0.9999999)
    assert all(len(row) <= 3 for row in kept(both))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(logits, p):
    expected = []
    for row in logits:
        probabilities = softmax(row)
        least = p * probabilities.max()
        expected.append({i for i, q in enumerate(probabilities) if q >= least})
    assert kept(keep_min_p(jnp.asarray(logits), p)) == expected


def test_repetition_penalty_by_hand():
    out = penalise_repetition(
        jnp.array([[2.0, -2.0, 0.0, 4.0]]), jnp.array([[True, True, True, False]]), 2.0
    )
    assert out.tolist() == [[1.0, -4.0, 0.0, 4.0]]


def test_order_of_filters(logits):
    """Temperature acts before top-p: at a high temperature the same p keeps more tokens."""
    cold, hot = (filtered(jnp.asarray(logits), Filters(t, top_p=0.7)) for t in (0.5, 2.0))
    assert all(len(a) < len(b) for a, b in zip(kept(cold), kept(hot), strict=True))
    np.testing.assert_allclose(hot[np.isfinite(hot)], (logits / 2)[np.isfinite(hot)], rtol=1e-6)


def test_greedy_and_its_penalty(logits, key):
    keys = jax.random.split(key, B)
    greedy = Sampling(temperature=0, top_p=0.5, repetition_penalty=None).filters
    assert choose(jnp.asarray(logits), greedy, keys).tolist() == logits.argmax(-1).tolist()
    past = whole_past(logits.argmax(-1)[:, None])
    penalised = choose(jnp.asarray(logits), Filters(repetition_penalty=1e6), keys, past)
    assert penalised.tolist() == np.argsort(-logits, -1)[:, 1].tolist()
    with pytest.raises(ValueError, match="need `past`"):
        choose(jnp.asarray(logits), Filters(repetition_penalty=2.0), keys)


def test_a_row_does_not_depend_on_its_neighbours(logits, key):
    keys, filters = jax.random.split(key, B), Filters(1.0, top_p=0.9, top_k=20)
    together = choose(jnp.asarray(logits), filters, keys)
    alone = [
        int(choose(jnp.asarray(logits[i : i + 1]), filters, keys[i : i + 1])[0]) for i in range(B)
    ]
    assert together.tolist() == alone


def test_frequencies_follow_the_filtered_distribution(key):
    """Chi-square of 20000 draws against softmax(logits / 0.7) cut by top-k 5; 1e-3 quantile."""
    logits = jnp.array([[1.0, 0.5, -0.3, 2.0, 0.1, 0.4, -1.0, 0.0]])
    n = 20_000
    draws = choose(jnp.tile(logits, (n, 1)), Filters(0.7, top_k=5), jax.random.split(key, n))
    counts = np.bincount(np.asarray(draws), minlength=8)
    keep = np.argsort(-np.asarray(logits[0]))[:5]
    assert set(np.flatnonzero(counts)) == set(keep.tolist())
    expected = n * softmax(np.asarray(logits[0])[keep] / 0.7)
    assert ((counts[keep] - expected) ** 2 / expected).sum() < 18.47  # 4 degrees of freedom


def test_log_prob_is_of_the_unmodified_logits(logits):
    tokens = jnp.array([0, 3, 5, V - 1])
    expected = [np.log(softmax(row)[t]) for row, t in zip(logits, tokens.tolist(), strict=True)]
    np.testing.assert_allclose(log_prob(jnp.asarray(logits), tokens), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2},
        {"repetition_penalty": -1},
        {"repetition_penalty": 0.0},
        {"max_tokens": 0},
    ],
)
def test_bad_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


PROCESSORS = """
import json, sys, torch
from transformers.generation import logits_process as lp
case = json.load(sys.stdin)
ids, z = torch.tensor(case["ids"]), torch.tensor(case["logits"])
for step in (lp.RepetitionPenaltyLogitsProcessor(1.3), lp.TemperatureLogitsWarper(0.8),
             lp.TopKLogitsWarper(25), lp.TopPLogitsWarper(0.9), lp.MinPLogitsWarper(0.03)):
    z = step(ids, z)
print(json.dumps([[x if x > -1e30 else None for x in row] for row in z.tolist()]))
"""


@pytest.mark.reference
def test_against_hugging_face(logits):
    python = Path(__file__).parents[2] / ".references/venv/bin/python"
    if not python.exists():
        pytest.skip("no reference environment")
    ids = np.array([[1, 2, 3], [4, 4, 4], [0, 59, 7], [8, 9, 10]])
    case = json.dumps({"ids": ids.tolist(), "logits": logits.tolist()})
    done = subprocess.run([python, "-c", PROCESSORS], input=case, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = np.array(json.loads(done.stdout), float)  # None -> nan
    ours = filtered(jnp.asarray(logits), Filters(0.8, 0.9, 0.03, 1.3, 25), whole_past(ids))
    np.testing.assert_allclose(np.where(np.isfinite(ours), ours, np.nan), theirs, rtol=1e-5)
