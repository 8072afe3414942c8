"""Speculative decoding: greedy as plain greedy, sampled as the exact distribution has it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import below_chi_square, every_sequence, make

from research.decode import DraftModel, Lookup, PromptError, Sampling, generate, speculate
from research.decode.drafts import Text, matched, rollback
from research.decode.generate import for_decoding
from research.decode.prompts import left_padded
from research.decode.speculative import advance, read
from research.models.decoder import empty_cache

V, PROMPT = 6, [1, 2, 3, 1, 2]


@pytest.fixture(scope="module")
def target():
    return make(V, seed=1, scale=3.0)


@pytest.fixture(scope="module")
def other():
    """A model of another opinion, and with fewer slots than the target."""
    return make(V, seed=8, scale=3.0, max_length=40)


@pytest.fixture(params=["lookup", "other", "same"])
def draft(request, target, other):
    """(draft, its parameters)"""
    if request.param == "lookup":
        return Lookup(count=3, ngram=2), None
    model, params, _ = target if request.param == "same" else other
    return DraftModel(model, count=3), params


@pytest.mark.parametrize(
    "more",
    [
        {"stop_ids": (4,)},
        {
            "repetition_penalty": 1.5,
            "banned_ids": (0,),
            "no_repeat_ngram": 2,
            "forced_ids": (3, 1),
        },
    ],
    ids=["stop", "filters"],
)
def test_greedy_is_plain_greedy(target, draft, more):
    model, params, _ = target
    sampling = Sampling(temperature=0, max_tokens=13, **more)
    for prompt in (PROMPT, [5], [0, 4, 4, 0, 4, 4, 0, 5, 5, 3]):
        plain = generate(model, params, [prompt], jax.random.key(0), sampling)
        found = speculate(model, params, prompt, jax.random.key(9), sampling, *draft)
        assert found.generation.rows() == plain.rows()
        np.testing.assert_allclose(found.generation.log_probs, plain.log_probs, atol=1e-4)
        assert 0 <= found.accepted <= found.proposed <= 3 * found.rounds
        # Every round adds its accepted tokens and one more, but where it is cut.
        assert 0 <= found.accepted + found.rounds - len(plain.rows()[0]) <= 1


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_draft_like_the_model_is_always_right(target, temperature):
    """12 tokens, four a round; proposed to the last and accepted, as p = q."""
    model, params, _ = target
    sampling = Sampling(temperature, max_tokens=12)
    draft = DraftModel(model, count=3)
    found = speculate(model, params, PROMPT, jax.random.key(2), sampling, draft, params)
    assert (found.rounds, found.proposed, found.accepted) == (3, 9, 9)
    assert found.tokens_per_round == 4


def sampled(target, draft, sampling, rows):
    """[rows, max_tokens] answers to PROMPT, each with a key of its own."""
    (draft, draft_params), (model, params, _) = draft, target
    width = len(PROMPT) + 2  # padding on the left as well
    tokens, segments = left_padded([PROMPT], width, 0)
    params, draft_params = for_decoding(params), draft_params and for_decoding(draft_params)

    @jax.jit
    @jax.vmap
    def one(key):
        state = read(model, params, draft, draft_params, tokens, segments, key, 24)
        stop = jnp.zeros(0, jnp.int32)
        go = partial(advance, model, params, draft, draft_params, state, sampling.filters)
        return go(stop, width, width + sampling.max_tokens).text.tokens

    answers = one(jax.random.split(jax.random.key(7), rows))
    return np.asarray(answers)[:, width : width + sampling.max_tokens]


@pytest.mark.parametrize("draft", ["lookup", "other"], indirect=True)
def test_samples_have_the_distribution_of_the_model(target, draft):
    """Chi-square of 4000 answers of 3 tokens over all 216; 1e-3 quantile."""
    counts = np.zeros((V,) * 3)
    np.add.at(counts, tuple(sampled(target, draft, Sampling(max_tokens=3), 4000).T), 1)
    exact = every_sequence(target[2], PROMPT, V, 3)
    expected = [4000 * np.exp(exact[ids]) for ids in np.ndindex(counts.shape)]
    assert sum(expected) == pytest.approx(4000, rel=1e-4)
    assert below_chi_square(counts.ravel(), expected)
    # The test can fail: these are not the frequencies of the draft's own model, or of no model.
    assert not below_chi_square(counts.ravel(), np.full(V**3, 4000 / V**3))


@pytest.mark.parametrize("draft", ["lookup", "other"], indirect=True)
def test_filters_act_on_model_and_draft(target, draft):
    """Temperature 0.7 and top-k 2: pairs of tokens against the same filters on exact numbers."""
    sampling = Sampling(temperature=0.7, top_k=2, max_tokens=2)
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(sampled(target, draft, sampling, 4000).T), 1)

    def cut(log_p):
        powers = np.exp(log_p / 0.7) * (log_p >= np.sort(log_p)[-2])
        return powers / powers.sum()

    table = target[2]([[*PROMPT, token] for token in range(V)])
    first = cut(table[0, -2])
    expected = np.array([first[token] * cut(table[token, -1]) for token in range(V)])
    assert ((counts > 0) == (expected > 0)).all()
    assert below_chi_square(counts.ravel(), 4000 * expected.ravel())


def test_lookup_by_hand():
    def propose(tokens, start, ngram, count):
        text = Text(jnp.array([*tokens, 0, 0]), jnp.array(start), jnp.array(len(tokens)))
        found = matched(text, ngram, count)
        return found[0].tolist() if bool(found[1]) else None

    assert propose([7, 1, 2, 5, 6, 3, 2, 8, 1, 2], 0, 2, 3) == [5, 6, 3]  # longest first
    assert propose([7, 1, 2, 5, 6, 3, 2, 8, 1, 2], 0, 1, 3) == [8, 1, 2]  # then latest
    assert propose([4, 1, 1], 0, 3, 4) == [1, 1, 1, 1]  # what follows repeats
    assert propose([9, 1, 2, 1, 2], 0, 3, 5) == [1, 2, 1, 2, 1]
    assert propose([1, 2, 3], 0, 3, 2) is None
    assert propose([3, 1, 2, 3], 1, 3, 2) is None  # the first 3 is padding


def test_rollback_gives_back_slots_and_positions(target):
    model, params, _ = target
    apply = partial(model.apply, {"params": params})
    ids = jnp.array([[1, 2, 3, 4, 5, 0, 2]])
    _, cache = apply(ids, cache=empty_cache(model, 1, 10))
    back = rollback(cache, jnp.array(4))
    assert back.lengths.tolist() == [4] and back.segment_ids.tolist() == [[1] * 4 + [0] * 6]
    again, _ = apply(ids[:, 4:], cache=back)
    np.testing.assert_allclose(again, apply(ids)[:, 4:], atol=1e-4)


def test_errors(target, other):
    model, params, _ = target
    run = partial(speculate, model, params, PROMPT, jax.random.key(0), Sampling(max_tokens=8))
    with pytest.raises(ValueError, match="a draft model needs draft_params"):
        run(DraftModel(other[0]))
    with pytest.raises(ValueError, match="Lookup has no parameters"):
        run(Lookup(), params)
    small = make(4, seed=0)
    with pytest.raises(ValueError, match="the draft model has 4 tokens, the model 6"):
        run(DraftModel(small[0]), small[1])
    with pytest.raises(PromptError, match="the draft proposes 40: together more than"):
        run(Lookup(count=40))
    with pytest.raises(PromptError, match="draft model's context of 40"):
        run(DraftModel(other[0], count=28), other[1])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        DraftModel(model, count=0)
    with pytest.raises(ValueError, match="ngram must be at least 1, got 0"):
        Lookup(ngram=0)
