"""Contrastive search against a slow form in NumPy that reads the whole text for each candidate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import make

from research.decode import Contrastive, PromptError, Sampling, contrastive_search, generate
from research.models import decoder
from research.models.decoder import DecoderConfig
from research.models.layers import GatedMlp
from research.models.linear_attention import LinearAttention
from research.models.sinks import StreamingAttention
from research.models.stack import Stack

V, PROMPTS = 11, [[1, 2, 3], [4], [0, 3, 3, 1, 2, 2, 4]]


@pytest.fixture(scope="module")
def tiny():
    return make(V, seed=3, scale=3.0)


def slow(states_of, log_probs, prompt, search):
    """[(id, log p)] of one prompt: the paper's equation 5, token by token."""
    ids, said = list(prompt), []
    while len(said) < search.max_tokens and (not said or said[-1][0] not in search.stop_ids):
        row = log_probs([ids])[0, -1]
        scores = {}
        for v in np.argsort(-row, kind="stable")[: search.top_k]:
            h = states_of([*ids, v])
            h = h / np.linalg.norm(h, axis=-1, keepdims=True)
            scores[int(v)] = (1 - search.alpha) * np.exp(row[v]) - search.alpha * (
                h[:-1] @ h[-1]
            ).max()
        best = max(scores, key=scores.get)
        ids.append(best)
        said.append((best, row[best]))
    return said


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_equals_a_slow_form(tiny, alpha):
    """Ragged prompts in one batch there, one by one here; an end in the middle of some."""
    model, params, log_probs = tiny

    @jax.jit
    def hidden(tokens):
        return model.apply({"params": params}, tokens, method="hidden")

    def states_of(ids):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(hidden(jnp.asarray(padded))[0, : len(ids)], np.float64)

    search = Contrastive(4, alpha, max_tokens=9, stop_ids=(5,))
    found = contrastive_search(model, params, PROMPTS, search, pad_id=1)
    for row, prompt in enumerate(PROMPTS):
        expected = slow(states_of, log_probs, prompt, search)
        assert found.rows()[row] == [token for token, _ in expected]
        length = found.lengths[row]
        np.testing.assert_allclose(
            found.log_probs[row, :length], [value for _, value in expected], atol=2e-4
        )
        assert (found.tokens[row, length:] == 1).all()
    greedy = slow(states_of, log_probs, PROMPTS[0], Contrastive(1, 0.0, 9, (5,)))
    assert found.rows()[0] != [token for token, _ in greedy]  # the case can tell them apart


@pytest.mark.parametrize(
    "attention",
    [StreamingAttention(2, 1, 8, window=3, sinks=1), LinearAttention(2, 1, 8, chunk=4)],
)
def test_bounded_caches_go_with_the_chosen_candidate(attention):
    block = decoder.Block(attention, GatedMlp(24))
    config = DecoderConfig(V, 16, (Stack(2, (block,)),), 48, embed_scale=4.0)
    model = decoder.Decoder(config)
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(4))
    params = jax.tree.map(lambda x: 3 * x, params)

    @jax.jit
    def apply(tokens):
        states = model.apply({"params": params}, tokens, method="hidden")
        return states, jax.nn.log_softmax(
            model.apply({"params": params}, states, method="project"), axis=-1
        )

    def padded(ids):
        return jnp.zeros((1, 48), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))

    def states_of(ids):
        return np.asarray(apply(padded(ids))[0][0, : len(ids)], np.float64)

    def log_probs(rows):
        return np.asarray(apply(padded(rows[0]))[1][:, : len(rows[0])], np.float64)

    search = Contrastive(3, 0.6, max_tokens=8)
    found = contrastive_search(model, params, PROMPTS, search)
    for row, prompt in enumerate(PROMPTS):
        assert found.rows()[row] == [t for t, _ in slow(states_of, log_probs, prompt, search)]


@pytest.mark.parametrize("search", [Contrastive(4, 0.0, 9), Contrastive(1, 0.6, 9)])
def test_without_contrast_or_choice_it_is_greedy(tiny, search):
    model, params, _ = tiny
    greedy = generate(
        model, params, PROMPTS, jax.random.key(0), Sampling(temperature=0, max_tokens=9)
    )
    assert contrastive_search(model, params, PROMPTS, search).rows() == greedy.rows()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"top_k": 0}, "top_k"), ({"alpha": 1.5}, "alpha"), ({"max_tokens": 0}, "0")],
)
def test_numbers_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Contrastive(**wrong)


def test_bad_input_is_named(tiny):
    model, params, _ = tiny
    with pytest.raises(ValueError, match="top_k is 12, the vocabulary has 11"):
        contrastive_search(model, params, PROMPTS, Contrastive(12, max_tokens=9))
    with pytest.raises(PromptError, match="prompt 1 holds token id 11"):
        contrastive_search(model, params, [[1], [11]], Contrastive(4, max_tokens=9))
