"""Filters against transformers' numbers, slow forms, and by hand.

The numbers are what scripts/references/logits_processors.py writes (transformers 5.23.0).
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode.filters import Past, ban_repeated, force, keep_eta, keep_typical
from research.decode.sampling import Sampling, filtered

TABLE = json.loads((Path(__file__).parent / "fixtures/processors.json").read_text())
LOGITS, IDS = np.array(TABLE["logits"], np.float32), np.array(TABLE["ids"])
CASES = {
    "typical 0.2": {"typical_p": 0.2},
    "typical 0.9": {"typical_p": 0.9},
    "epsilon 0.05": {"epsilon": 0.05},
    "epsilon 0.9": {"epsilon": 0.9},
    "eta 0.1": {"eta": 0.1},
    "eta 0.001": {"eta": 0.001},
    "ngram 1": {"no_repeat_ngram": 1},
    "ngram 2": {"no_repeat_ngram": 2},
    "ngram 3": {"no_repeat_ngram": 3},
    "ngram 7": {"no_repeat_ngram": 7},
    "banned 2 11": {"banned_ids": (2, 11)},
    "forced 6": {"forced_ids": (6,)},
    "chain": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram": 2,
        "banned_ids": (5, 10),
        "temperature": 0.8,
        "top_k": 10,
        "top_p": 0.9,
        "min_p": 0.03,
        "typical_p": 0.9,
        "epsilon": 0.04,
        "eta": 0.2,
    },
}


def padded(ids):
    """A Past with two slots of padding before, and two slots that are not reached yet."""
    B, S = ids.shape
    tokens = np.pad(ids, ((0, 0), (2, 2)), constant_values=ids[0, -1])
    return Past(jnp.asarray(tokens), jnp.full(B, 2), jnp.full(B, 2 + S))


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name):
    """Nothing is said yet, so that a forced first token is forced."""
    assert set(CASES) | {"ids", "logits"} == set(TABLE)
    filters = Sampling(**CASES[name]).filters
    ours = jax.jit(filtered)(LOGITS, filters, padded(IDS), jnp.zeros(len(IDS), jnp.int32))
    theirs = np.array(TABLE[name], float)  # None -> nan
    if name != "ngram 7":
        assert np.isnan(theirs).any()
    ours = np.where(np.isfinite(ours), ours, np.nan)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_repeated_ngrams_by_a_slow_form(key, n):
    """Ragged rows over 3 tokens with room beyond the end; ids outside the row count for nothing."""
    B, S, V = 60, 14, 3
    rng = np.random.default_rng(n)
    tokens, start = rng.integers(0, V, (B, S)), rng.integers(0, 6, B)
    end = start + rng.integers(1, S - 6, B)
    logits = jax.random.normal(key, (B, V))
    ours = ban_repeated(logits, Past(jnp.asarray(tokens), jnp.asarray(start), jnp.asarray(end)), n)
    some = 0
    for row in range(B):
        ids = tokens[row, start[row] : end[row]].tolist()
        grams = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
        banned = {t for t in range(V) if tuple([*ids[len(ids) - n + 1 :], t]) in grams}
        banned = set() if len(banned) == V else banned
        assert set(np.flatnonzero(np.isneginf(ours[row])).tolist()) == banned
        some += len(banned)
    assert some


def test_a_row_that_can_only_repeat_itself_may():
    past = padded(np.array([[0, 1, 2, 0], [0, 1, 1, 0]]))
    logits = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, -jnp.inf]])
    assert ban_repeated(logits, past, 1).tolist() == logits.tolist()
    assert jnp.isneginf(ban_repeated(logits[:1, :].repeat(2, 0), past, 1)).sum(-1).tolist() == [
        0,
        2,
    ]


def test_typical_by_hand():
    """p = .5, .25, .125, .125; H = 1.75 bits: .25 is .25 bits away, .5 .75, both .125 1.25."""
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
    for mass, kept in ((0.2, 1), (0.3, 2), (0.76, 4), (1.0, 4)):
        out = keep_typical(logits, mass)
        assert np.isfinite(out).sum() == kept
    assert np.isfinite(keep_typical(logits, 0.2))[0].tolist() == [False, True, False, False]


def test_eta_by_hand():
    """Uniform over 8: H = ln 8, so √ε e^−H = √ε / 8; below 1/8 all stay, whatever ε."""
    assert np.isfinite(keep_eta(jnp.zeros((1, 8)), 0.9)).all()
    peaked = jnp.log(jnp.array([[0.9, 0.09, 0.01]]))  # H = 0.359: η = min(ε, 0.698 √ε)
    assert np.isfinite(keep_eta(peaked, 0.05))[0].tolist() == [True, True, False]
    assert np.isfinite(keep_eta(peaked, 0.1))[0].tolist() == [True, False, False]


def test_forced_tokens_stand_at_their_places():
    out = force(jnp.full((3, 4), -jnp.inf).at[:, 1].set(5.0), jnp.array([2, 3]), jnp.arange(3))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in out] == [[2], [3], [1]]


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"typical_p": 0.0}, r"typical_p must be in \(0, 1\], got 0.0"),
        ({"epsilon": 1.0}, r"epsilon must be in \(0, 1\), got 1.0"),
        ({"eta": 0.0}, r"eta must be in \(0, 1\), got 0.0"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be at least 1, got 0"),
        ({"banned_ids": (1, 2), "forced_ids": (2,)}, r"forced_ids and banned_ids both hold \[2\]"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_ids_outside_the_vocabulary_and_missing_history():
    with pytest.raises(ValueError, match=r"forced_ids holds 9; ids are 0..8"):
        Sampling(forced_ids=(3, 9)).check_ids(9)
    with pytest.raises(ValueError, match="banned_ids holds all 2 ids"):
        Sampling(banned_ids=(0, 1)).check_ids(2)
    with pytest.raises(ValueError, match="no_repeat_ngram need `past`"):
        filtered(jnp.zeros((1, 4)), Sampling(no_repeat_ngram=2).filters)
    with pytest.raises(ValueError, match="forced tokens need `said`"):
        filtered(jnp.zeros((1, 4)), Sampling(forced_ids=(2,)).filters)
