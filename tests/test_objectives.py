"""next_token against a loss written out by hand, and what the head's subtree is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.losses.preference import dpo
from research.losses.reward import pairwise
from research.models import arrange, decoder, heads
from research.models.attention import Attention
from research.models.layers import GatedMlp, Linear
from research.objectives import (
    answer_log_probs,
    answer_scores,
    head_params,
    next_token,
    preference,
    reward,
    with_penalty,
)
from research.types import Mean

V, D, B, T = 40, 16, 2, 9
INIT = jax.jit(decoder.init, static_argnums=0)


def tiny(tied: bool) -> decoder.Decoder:
    block = decoder.Block(Attention(heads=4, kv_heads=2, head_size=4), GatedMlp(24))
    head = None if tied else Linear(V, ("embed", "vocab"))
    return decoder.Decoder(
        decoder.DecoderConfig(V, D, (decoder.Stack(1, (block,)),), max_length=32, head=head)
    )


@pytest.fixture
def batch(key):
    tokens = jax.random.randint(key, (B, T + 1), 0, V)
    segments = jnp.array([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2])
    weights = jnp.array([[0, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0, 0, 0]]) / 7
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "segment_ids": segments,
        "positions": arrange.segment_positions(segments),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_next_token_by_hand(batch, key, tied):
    model = tiny(tied)
    params = jax.tree.map(lambda x: 3 * x, INIT(model, key))
    assert set(head_params(params)) == {"embed" if tied else "head"}

    def by_hand(params):
        logits = model.apply(
            {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        logp = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
        return -(own * batch["weights"]).sum()

    expected, gradient = jax.jit(jax.value_and_grad(by_hand))(params)
    for fused in (True, False):
        objective = next_token(model, fused=fused, chunk=2)
        loss = lambda p: objective(p, None, batch, None)  # noqa: B023, E731
        (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"].value, expected, rtol=1e-6)
        assert metrics["tokens"].total == 7
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_micro_batches_add_up(batch, key):
    model = tiny(True)
    params, objective = INIT(model, key), jax.jit(next_token(model))
    whole, metrics = objective(params, None, batch, None)
    parts = [
        objective(params, None, {k: v[i : i + 1] for k, v in batch.items()}, None) for i in range(B)
    ]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole, rtol=1e-6)
    added = parts[0][1]["loss"] + parts[1][1]["loss"]
    np.testing.assert_allclose(added.value, metrics["loss"].value, rtol=1e-6)


def test_penalty_adds_and_reports(batch, key):
    model = tiny(True)
    params, base = INIT(model, key), jax.jit(next_token(model))

    def pull(params, context, rng):
        value = sum(((p - q) ** 2).sum() for p, q in zip(*map(jax.tree.leaves, (params, context))))  # noqa: B905
        return value, {"distance": Mean.of(value)}

    start = jax.tree.map(lambda x: x + 0.5, params)
    loss, metrics = with_penalty(base, pull)(params, start, batch, None)
    size = sum(x.size for x in jax.tree.leaves(params))
    np.testing.assert_allclose(loss - base(params, None, batch, None)[0], size / 4, rtol=1e-4)
    np.testing.assert_allclose(metrics["distance"].value, size / 4, rtol=1e-4)
    with pytest.raises(ValueError, match="both report"):
        with_penalty(base, lambda *_: (0.0, {"loss": Mean.of(0.0)}))(params, start, batch, None)


def pair_batch(key):
    """Three rows of two answers of unequal lengths, the last row padding alone."""
    tokens = jax.random.randint(key, (3, 13), 0, V)
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 6 + [2] * 4 + [0] * 2, [0] * 12])
    weights = (
        jnp.zeros((3, 12)).at[0, 2:4].set(1).at[0, 8:11].set(1).at[1, 3:5].set(1).at[1, 8].set(1)
    )
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "segment_ids": segments,
        "positions": arrange.segment_positions(segments),
        "pair_weights": jnp.array([0.5, 0.5, 0.0]),
    }


def alone(model, params, batch, row, segment):
    """The answer's log-probability from a forward pass of its segment alone."""
    inside = np.flatnonzero(np.asarray(batch["segment_ids"][row]) == segment)
    logits = model.apply({"params": params}, batch["tokens"][row, inside][None])[0]
    own = jax.nn.log_softmax(logits)[jnp.arange(len(inside)), batch["targets"][row, inside]]
    return (own * batch["weights"][row, inside]).sum()


def test_answers_of_a_packed_pair_are_what_they_are_alone(key):
    model, batch = tiny(True), pair_batch(key)
    params = INIT(model, key)
    sums, counts = answer_log_probs(model, params, batch)
    wanted = [[alone(model, params, batch, r, s) for s in (1, 2)] for r in (0, 1)]
    np.testing.assert_allclose(sums[:2], wanted, atol=1e-5)
    np.testing.assert_array_equal(counts, [[2, 3], [2, 1], [1, 1]])
    np.testing.assert_array_equal(sums[2], 0)


def test_preference_is_the_mean_of_the_losses_of_its_pairs(key):
    model, batch = tiny(True), pair_batch(key)
    params, other = (INIT(model, k) for k in jax.random.split(key))
    batch["reference"], _ = answer_log_probs(model, other, batch)

    def by_hand(params):
        ratios = [
            [alone(model, params, batch, r, s) - alone(model, other, batch, r, s) for s in (1, 2)]
            for r in (0, 1)
        ]
        return sum(-jax.nn.log_sigmoid(0.3 * (w - l)) for w, l in ratios) / 2

    run = jax.value_and_grad(preference(model, partial(dpo, beta=0.3)), has_aux=True)
    (value, metrics), grads = jax.jit(run)(params, None, batch, None)
    wanted, wanted_grads = jax.value_and_grad(by_hand)(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert float(metrics["loss"].value) == pytest.approx(float(wanted), rel=1e-5)
    assert float(metrics["accuracy"].count) == 2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grads, wanted_grads)


def test_a_policy_that_is_its_reference_has_the_loss_ln_2(key):
    model, batch = tiny(False), pair_batch(key)
    params = INIT(model, key)
    batch["reference"], _ = answer_log_probs(model, params, batch)
    value, _ = preference(model, dpo)(params, None, batch, None)
    assert float(value) == pytest.approx(np.log(2), rel=1e-6)


def test_a_reward_model_reads_the_end_of_each_answer(key):
    model, batch, head = tiny(True), pair_batch(key), heads.Head(1)
    params = heads.add(INIT(model, key), head, D, key)
    scores = answer_scores(model, head, params, batch)
    for row, segment in ((0, 1), (0, 2), (1, 2)):
        inside = np.flatnonzero(np.asarray(batch["segment_ids"][row]) == segment)
        tokens = batch["tokens"][row, inside][None]
        hidden = model.apply({"params": params}, tokens, method="hidden")
        wanted = hidden[0, -1] @ params["score"]["kernel"][:, 0]
        np.testing.assert_allclose(scores[row, segment - 1], wanted, atol=1e-5)
    value, metrics = reward(model, head)(params, None, batch, None)
    np.testing.assert_allclose(value, pairwise(*scores[:2].T).mean(), rtol=1e-5)
    assert float(metrics["accuracy"].count) == 2
