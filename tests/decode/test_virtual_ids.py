"""Decoding with a learned prompt: its ids are read, and never counted or said."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import make

from research.decode import (
    Beams,
    Contrastive,
    DraftModel,
    Lookup,
    PromptError,
    Sampling,
    beam_search,
    contrastive_search,
    generate,
    speculate,
    stream,
)
from research.decode.drafts import Text
from research.decode.filters import Past
from research.decode.generate import for_decoding
from research.decode.prompts import readable
from research.decode.sampling import filtered
from research.models import decoder
from research.models.layers import GatedMlp
from research.models.sinks import StreamingAttention
from research.weights import prompt

V, P, CONTEXT = 20, 3, 48
TEXTS = [[5, 9, 2, 5, 9], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
GREEDY = Sampling(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def plain():
    model, params, _ = make(V, seed=1, max_length=CONTEXT)
    return model, params


@pytest.fixture(scope="module")
def tuned(plain):
    model, params = plain
    return model, prompt.add(params, jax.random.key(2), P, partial(prompt.normal, std=0.3))


@pytest.fixture(scope="module")
def prompts(tuned):
    """One has its virtual ids first, one last, one as a template around the text."""
    first, second, third = TEXTS
    a, b, c = prompt.ids(tuned[1])
    return [[a, b, c, *first], [*second, a, b, c], [a, b, *third, c]]


@pytest.fixture(scope="module")
def answers(tuned, prompts):
    """By one forward pass a token, without a cache."""
    model, params = tuned
    apply = jax.jit(lambda ids: model.apply({"params": params}, ids[None])[0])

    def continued(ids):
        row = list(ids)
        for _ in range(GREEDY.max_tokens):
            padded = jnp.zeros(CONTEXT, jnp.int32).at[: len(row)].set(jnp.asarray(row))
            row.append(int(apply(padded)[len(row) - 1].argmax()))
        return row[len(ids) :]

    return [continued(ids) for ids in prompts]


def test_greedy_equals_the_full_forward(plain, tuned, prompts, answers):
    model, params = tuned
    decoding = for_decoding(params)
    assert generate(model, decoding, prompts, jax.random.key(0), GREEDY).rows() == answers
    assert max(map(max, answers)) < V
    without = generate(*plain, TEXTS, jax.random.key(0), GREEDY).rows()
    assert all(a != b for a, b in zip(answers, without, strict=True))


def test_every_search_reads_them(tuned, prompts, answers):
    model, params = tuned
    one = Beams(beams=1, max_tokens=GREEDY.max_tokens)
    assert beam_search(model, params, prompts, one).rows() == answers
    one = Contrastive(top_k=1, max_tokens=GREEDY.max_tokens)
    assert contrastive_search(model, params, prompts, one).rows() == answers
    for ids, answer in zip(prompts[:2], answers, strict=False):
        found = speculate(model, params, ids, jax.random.key(0), GREEDY, Lookup(count=3))
        assert found.generation.rows() == [answer]


def streaming():
    """A model that never ends, and that decodes what the caller gives."""
    block = decoder.Block(StreamingAttention(2, 1, 8, window=16), GatedMlp(24))
    config = decoder.DecoderConfig(V, 16, (decoder.Stack(2, (block,)),), CONTEXT)
    return decoder.Decoder(config)


def test_a_model_without_a_prompt_refuses_them_everywhere(plain, tuned, prompts):
    model, params = plain
    key = jax.random.key(0)
    calls = {
        "generate": lambda: generate(model, params, prompts, key, GREEDY),
        "beams": lambda: beam_search(model, params, prompts),
        "contrastive": lambda: contrastive_search(model, params, prompts),
        "speculate": lambda: speculate(model, params, prompts[0], key, GREEDY),
        "stream": lambda: stream(streaming(), params, prompts, key, GREEDY),
        "draft": lambda: speculate(
            *tuned, prompts[0], key, GREEDY, DraftModel(model), draft_params=params
        ),
    }
    for name, call in calls.items():
        with pytest.raises(PromptError, match=r"prompt 0 holds token id 22; ids are 0\.\.19"):
            call()
            pytest.fail(name)
    assert (readable(params), readable(tuned[1])) == (V, V + P)
    with pytest.raises(PromptError, match=r"token id 23; ids are 0\.\.22"):
        generate(*tuned, [[1, V + P]], key, GREEDY)


def test_they_count_against_the_context_and_are_no_ids_to_say(tuned, prompts):
    model, params = tuned
    key, limit = jax.random.key(0), CONTEXT - len(prompts[2])
    with pytest.raises(PromptError, match=r"prompt 2 has 21 tokens and max_tokens is 28"):
        generate(model, params, prompts, key, Sampling(max_tokens=limit + 1))
    with pytest.raises(ValueError, match=r"forced_ids holds 20; ids are 0\.\.19"):
        generate(model, params, prompts, key, Sampling(max_tokens=4, forced_ids=(V,)))


@pytest.mark.parametrize(
    "rules",
    [{"repetition_penalty": 1.7}, *({"no_repeat_ngram": n} for n in (1, 2, 3))],
    ids=lambda rules: "-".join(map(str, *rules.items())),
)
def test_filters_that_look_back_see_the_text_alone(rules):
    """Virtual ids before the text change nothing of what may follow it."""
    texts = np.asarray([[5, 9, 2, 5, 9], [7, 7, 7, 7, 7]])
    virtual = np.broadcast_to([V, V + 1, V + 2], (2, 3))
    logits = jax.random.normal(jax.random.key(0), (2, V))
    found = []
    for tokens in (texts, np.concatenate([virtual, texts], axis=1)):
        whole = Past(jnp.asarray(tokens), jnp.zeros(2, int), jnp.full(2, tokens.shape[1]))
        found.append(filtered(logits, Sampling(**rules).filters, whole))
    np.testing.assert_array_equal(*found)
    assert np.abs(np.nan_to_num(found[0] - logits, neginf=-9)).max() > 0.1


def test_an_ngram_with_a_virtual_id_is_never_repeated():
    """The row ends with virtual ids that stood before, and 3 came after them."""
    tokens = jnp.asarray([[V, V + 1, 3, 8, V, V + 1]])
    logits = jnp.ones((1, V))
    for n, banned in ((1, [3, 8]), (2, []), (3, [])):
        past = Past(tokens, jnp.zeros(1, int), jnp.full(1, 6))
        kept = filtered(logits, Sampling(no_repeat_ngram=n).filters, past)
        assert np.flatnonzero(np.isneginf(kept[0])).tolist() == banned


def test_lookup_proposes_text_alone():
    """After 7 came 3 and then a virtual id; after 4 a virtual id came at once."""
    for last, valid in ((7, [True, False, False]), (4, [False] * 3)):
        row = jnp.asarray([7, 3, V, 4, V + 1, 5, last])
        text = Text(row, jnp.asarray(0), jnp.asarray(7))
        proposal, _ = Lookup(count=3, ngram=1).propose(None, None, text, None, 0, V, None)
        assert proposal.valid.tolist() == valid
        assert proposal.q.sum(-1).tolist() == [float(v) for v in valid]
    assert proposal.tokens[0] == V + 1
