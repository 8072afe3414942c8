"""Generation on a tiny random model, against a loop that runs the full forward pass each time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode import Generation, PromptError, Sampling, generate
from research.decode.generate import advance, for_decoding
from research.decode.prompts import bucket, left_padded
from research.models import decoder
from research.models.attention import Attention
from research.models.layers import GatedMlp, Linear
from research.weights import lora, merge
from research.weights.base import is_weight
from research.weights.transposed import Transposed

V, D = 60, 32
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [59, 0]]
GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model():
    block = decoder.Block(Attention(heads=4, kv_heads=2, head_size=8), GatedMlp(48))
    return decoder.Decoder(decoder.DecoderConfig(V, D, (decoder.Stack(2, (block,)),), 64))


@pytest.fixture(scope="module")
def params(model):
    """Large weights, so that the choices are far from ties."""
    return jax.tree.map(
        lambda x: 6 * x, jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(1))
    )


@pytest.fixture(scope="module")
def full(model, params):
    """Logits of a sequence by one forward pass without a cache, [T, V]."""
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))

    def logits(ids):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids  # causal: what follows changes nothing
        return np.asarray(apply(padded)[0, : len(ids)])

    return logits


@pytest.fixture(scope="module")
def greedy(model, params):
    return generate(model, params, PROMPTS, jax.random.key(0), GREEDY)


def test_ragged_greedy_equals_the_full_forward(greedy, full):
    for prompt, answer, log_probs in zip(PROMPTS, greedy.rows(), greedy.log_probs, strict=True):
        ids = list(prompt)
        for token, value in zip(answer, log_probs, strict=True):
            logits = full(ids)[-1]
            assert token == logits.argmax()
            exact = logits[token] - np.logaddexp.reduce(logits.astype(np.float64))
            np.testing.assert_allclose(value, exact, atol=1e-4)
            ids.append(token)


def test_batch_equals_one_by_one(model, params, greedy):
    for prompt, answer in zip(PROMPTS, greedy.rows(), strict=True):
        alone = generate(model, params, [prompt], jax.random.key(0), GREEDY)
        assert alone.rows() == [answer]


def test_sampled_rows_do_not_depend_on_neighbours(model, params):
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, max_tokens=10)
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    together = generate(model, params, PROMPTS, keys, sampling).rows()
    for i in (0, 2):
        assert generate(model, params, PROMPTS[i : i + 1], keys[i : i + 1], sampling).rows() == [
            together[i]
        ]
    other = generate(model, params, PROMPTS, jax.random.key(4), sampling).rows()
    assert other != together


def test_sampled_log_probs_are_those_of_the_model(model, params, full):
    sampling = Sampling(temperature=0.5, top_k=7, repetition_penalty=1.5, max_tokens=10)
    out = generate(model, params, PROMPTS, jax.random.key(5), sampling)
    for prompt, answer, log_probs in zip(PROMPTS, out.rows(), out.log_probs, strict=True):
        logits = full(prompt + answer)[len(prompt) - 1 : -1]
        exact = jax.nn.log_softmax(jnp.asarray(logits))[jnp.arange(len(answer)), jnp.array(answer)]
        np.testing.assert_allclose(log_probs, exact, atol=1e-4)


@pytest.mark.parametrize("every", [1, 5])
def test_streaming_gives_the_same(model, params, every):
    sampling = Sampling(temperature=1.0, min_p=0.01, max_tokens=12, stop_ids=(3, 8, 20))
    rng, heard = jax.random.key(6), [[] for _ in PROMPTS]

    def callback(new):
        assert all(len(row) <= every for row in new)
        for row, ids in zip(heard, new, strict=True):
            row += ids

    silent = generate(model, params, PROMPTS, rng, sampling)
    streamed = generate(
        model, params, PROMPTS, rng, sampling, callback=callback, stream_every=every
    )
    assert streamed.rows() == silent.rows() == heard
    np.testing.assert_array_equal(streamed.log_probs, silent.log_probs)


def test_stop_ids_end_a_row_and_are_kept(model, params, greedy):
    rows = greedy.rows()
    stop = (rows[0][4], rows[2][2])
    out = generate(
        model,
        params,
        PROMPTS,
        jax.random.key(0),
        Sampling(temperature=0, max_tokens=12, stop_ids=stop),
        pad_id=17,
    )
    for row, tokens, length, log_probs, whole in zip(
        out.rows(), out.tokens, out.lengths, out.log_probs, rows, strict=True
    ):
        end = next((i + 1 for i, t in enumerate(whole) if t in stop), len(whole))
        assert row == whole[:end] and length == end
        assert (tokens[end:] == 17).all() and not log_probs[end:].any() and log_probs[:end].all()
    assert isinstance(out, Generation) and out.tokens.shape == (4, 12)


def decoded_twice(params):
    return for_decoding(for_decoding(decoder.unstack(params)))


@pytest.mark.parametrize("form", [decoder.unstack, for_decoding, decoded_twice])
def test_parameters_in_another_form_give_the_same(model, params, greedy, form):
    out = generate(model, form(params), PROMPTS, jax.random.key(0), GREEDY)
    np.testing.assert_array_equal(out.tokens, greedy.tokens)


def test_decoding_reads_every_large_matrix_transposed(model):
    head = Linear(V, ("embed", "vocab"))
    untied = decoder.Decoder(dataclasses.replace(model.config, head=head))
    params = decoder.init(untied, jax.random.key(3))
    ready = for_decoding(params)
    matrices = [
        w for w in jax.tree.leaves(ready, is_leaf=is_weight) if np.ndim(w) == 2 or is_weight(w)
    ]
    assert [w is ready["embed"]["table"] for w in matrices if not is_weight(w)] == [True]
    assert isinstance(ready["head"]["kernel"], Transposed) and len(matrices) == 2 + 2 * 7
    got, want = (
        generate(untied, form, PROMPTS, jax.random.key(0), GREEDY) for form in (ready, params)
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_an_adapter_not_merged_decodes_like_the_merged_matrices(model, params):
    tuned = lora.add(params, r".*/kernel", jax.random.key(2), rank=2)
    tuned = jax.tree.map(
        lambda w: w.replace(b=w.b + 0.1) if isinstance(w, lora.LoRA) else w,
        tuned,
        is_leaf=is_weight,
    )
    got, want = (
        generate(model, form, PROMPTS, jax.random.key(0), GREEDY) for form in (tuned, merge(tuned))
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-3)


def test_numbers_of_the_sampling_compile_nothing_new(model, params):
    run = lambda **numbers: generate(  # noqa: E731
        model, params, PROMPTS, jax.random.key(0), Sampling(max_tokens=9, **numbers)
    )
    run(temperature=0.7, top_p=0.9)
    before = advance._cache_size()
    run(temperature=1.3, top_p=0.2)
    generate(
        model, params, PROMPTS[::-1], jax.random.key(0), Sampling(0.2, top_p=0.5, max_tokens=11)
    )
    assert advance._cache_size() == before


def test_frequencies_of_a_first_token(model, params, full):
    """Chi-square of 2000 rows against the model's distribution; 1e-3 quantile."""
    rows, prompt = 2000, [5, 9, 2]
    sampling = Sampling(temperature=2.0, max_tokens=1)
    out = generate(model, params, [prompt] * rows, jax.random.key(7), sampling)
    scores = full(prompt)[-1].astype(np.float64) / 2
    expected = rows * np.exp(scores - np.logaddexp.reduce(scores))
    counts = np.bincount(out.tokens[:, 0], minlength=V).astype(float)
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    chi = ((counts - expected) ** 2 / expected).sum()
    k = len(expected) - 1  # Wilson-Hilferty's approximation of the quantile
    assert chi < k * (1 - 2 / (9 * k) + 3.09 * (2 / (9 * k)) ** 0.5) ** 3


@pytest.mark.parametrize(
    "prompts,message",
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, V]], f"prompt 0 holds token id {V}; ids are 0..{V - 1}"),
        ([[1, -1]], "prompt 0 holds token id -1"),
        ([[1], [2] * 60], "prompt 1 has 60 tokens and max_tokens is 12"),
    ],
)
def test_bad_prompts(model, params, prompts, message):
    with pytest.raises(PromptError, match=message):
        generate(model, params, prompts, jax.random.key(0), GREEDY)


def test_a_wrong_number_of_keys(model, params):
    with pytest.raises(ValueError, match="expected one key or 4 keys"):
        generate(model, params, PROMPTS, jax.random.split(jax.random.key(0), 3), GREEDY)


def test_buckets_and_padding():
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 64, 65, 100, 1024, 1025)] == [
        16, 16, 20, 32, 40, 64, 80, 112, 1024, 1280,
    ]  # fmt: skip
    assert all(n <= bucket(n) <= 1.25 * n for n in range(16, 3000))
    assert [bucket(n, 64, 2) for n in (1, 64, 65, 97, 200, 257)] == [64, 64, 96, 128, 256, 384]
    tokens, segments = left_padded([[1, 2], [3]], 3, 9)
    assert tokens.tolist() == [[9, 1, 2], [9, 9, 3]]
    assert segments.tolist() == [[0, 1, 1], [0, 0, 1]]
