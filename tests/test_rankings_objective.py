"""Orders of answers as an objective: pairs are orders of two, and rows stand alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.rankings import Ranking, order_rows, orders
from research.losses.reward import ranked
from research.models import decoder, heads
from research.models.families.llama import llama
from research.objectives import order_scores, ranking, reward

MODEL = decoder.Decoder(llama(40, 1, 16, 2, 1, 32, head_size=8, tied=True, init_std=0.4))
HEAD = heads.Head(1, init_std=1.0)


def encode(messages):
    ids = [ord(c) % 40 for m in messages for c in m["content"]]
    answer = len(messages[-1]["content"])
    return np.array(ids), np.arange(len(ids)) >= len(ids) - answer


def table(*answers):
    prompt = [{"role": "user", "content": "why"}]
    found, _ = orders([("row", Ranking(prompt, each)) for each in answers], encode, 16)
    return order_rows(found, 36)


@pytest.fixture(scope="module")
def params():
    plain = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
    return heads.add(plain, HEAD, 16, jax.random.key(1))


def test_two_answers_are_a_pair(params):
    weights = np.array([0.75, 0.25, 0], np.float32)
    batch = table(("yes", "no"), ("b", "aaa"), ("x", "yy")) | {"pair_weights": weights}
    expected, told = reward(MODEL, HEAD)(params, None, batch, None)
    found, metrics = ranking(MODEL, HEAD, 2)(params, None, batch, None)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name in ("loss", "accuracy", "score"):
        np.testing.assert_allclose(metrics[name].value, told[name].value, rtol=1e-6)
    assert metrics["best"].value == metrics["accuracy"].value and metrics["best"].count == 2


def test_three_answers_against_each_alone(params):
    batch = table(("yes", "no", "so"), ("b", "aaa", "cc")) | {"pair_weights": np.full(2, 0.5)}
    scores = order_scores(MODEL, HEAD, params, batch, 3)
    for row in range(2):
        for answer in range(3):
            ids = batch["tokens"][row][batch["segment_ids"][row] == answer + 1][None]
            alone = MODEL.apply({"params": params}, ids, method="hidden")
            np.testing.assert_allclose(scores[row, answer], HEAD(params, alone)[0, 0], atol=1e-5)
    loss, metrics = ranking(MODEL, HEAD, 3)(params, None, batch, None)
    np.testing.assert_allclose(loss, ranked(scores).mean(), rtol=1e-6)
    order = np.array(scores)
    hits = [order[:, 0] > order[:, 1], order[:, 0] > order[:, 2], order[:, 1] > order[:, 2]]
    np.testing.assert_allclose(metrics["accuracy"].value, np.mean(hits), rtol=1e-6)
    np.testing.assert_allclose(metrics["best"].value, np.mean(hits[0] & hits[1]))


def test_training_puts_answers_in_order(params):
    batch = table(("yes", "no", "so"), ("b", "aaa", "cc")) | {"pair_weights": np.full(2, 0.5)}
    objective = ranking(MODEL, HEAD, 3)
    step = jax.jit(jax.value_and_grad(lambda p: objective(p, None, batch, None), has_aux=True))
    for _ in range(40):
        (_, metrics), grads = step(params)
        params = jax.tree.map(lambda p, g: p - 0.2 * jnp.clip(g, -1, 1), params, grads)
    assert metrics["accuracy"].value == 1
