"""Heads on sequences against transformers' numbers and forms written out.

The fixture is what scripts/references/classification.py writes (transformers 5.23.0, float32).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from research import hub
from research.models import decoder, heads
from research.models.heads import Head
from research.objectives import classify, regress
from research.train.sharding import make_mesh, shardings

FOLDER = Path(__file__).parent / "fixtures" / "classification"
EXPECTED = load_file(FOLDER / "expected.safetensors")
SEGMENTS = jnp.array([[1, 1, 1, 0], [0, 0, 2, 2], [0, 0, 0, 0]])
HIDDEN = jnp.arange(24.0).reshape(3, 4, 2)


@pytest.fixture(scope="module")
def pretrained():
    return hub.load(FOLDER)


@pytest.mark.parametrize(("name", "objective"), [("classify", classify), ("regress", regress)])
def test_values_and_gradients_equal_transformers(pretrained, name, objective):
    model, expected = pretrained.model, {n: EXPECTED[f"{name}.{n}"] for n in NAMES}
    head = Head(len(expected["score"]))
    params = pretrained.params | {"score": {"kernel": jnp.asarray(expected["score"].T)}}
    tokens = EXPECTED["tokens"].astype(np.int32)
    labels = expected["labels"]
    batch = {
        "tokens": tokens,
        "segment_ids": (tokens != 0).astype(np.int32),
        "labels": labels.astype(np.int32 if name == "classify" else np.float32),
        "weights": np.full(3, 1 / 3, np.float32),
    }
    loss = jax.value_and_grad(lambda p: objective(model, head)(p, None, batch, None), has_aux=True)
    (value, metrics), grads = jax.jit(loss)(params)
    hidden = model.apply(
        {"params": params}, tokens, segment_ids=batch["segment_ids"], method="hidden"
    )
    got = head(params, hidden, batch["segment_ids"])
    np.testing.assert_allclose(got, expected["logits"], atol=1e-5)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(grads["score"]["kernel"].T, expected["score_gradient"], atol=1e-5)
    query = grads["stack_0"]["block_0"]["attention"]["q"]["kernel"][0]
    np.testing.assert_allclose(query.T, expected["query_gradient"], atol=1e-5)
    if name == "classify":
        hits = expected["logits"].argmax(1) == labels
        np.testing.assert_allclose(metrics["accuracy"].value, hits.mean(), rtol=1e-6)
    else:
        error = np.abs(expected["logits"] - labels).mean()
        np.testing.assert_allclose(metrics["absolute_error"].value, error, rtol=1e-5)


NAMES = ("score", "labels", "logits", "loss", "score_gradient", "query_gradient")


def test_pooling_by_hand():
    """Padded on the right, on the left, and padding alone."""
    last = heads.last_token(HIDDEN, SEGMENTS)
    np.testing.assert_array_equal(last, [[4, 5], [14, 15], [16, 17]])
    mean = heads.masked_mean(HIDDEN, SEGMENTS)
    np.testing.assert_array_equal(mean, [[2, 3], [13, 14], [0, 0]])


def test_padding_may_hold_anything():
    poisoned = jnp.where(SEGMENTS[..., None] == 0, jnp.nan, HIDDEN)[:2]
    assert np.isfinite(heads.masked_mean(poisoned, SEGMENTS[:2])).all()
    assert np.isfinite(heads.last_token(poisoned, SEGMENTS[:2])).all()


def test_mean_and_bias_by_hand(key):
    head = Head(3, heads.masked_mean, bias=True)
    params = heads.add({}, head, 2, key)
    params["score"]["bias"] = jnp.array([1.0, 2.0, 3.0])
    want = np.array([2.0, 3.0]) @ np.asarray(params["score"]["kernel"]) + [1, 2, 3]
    np.testing.assert_allclose(head(params, HIDDEN, SEGMENTS)[0], want, rtol=1e-5)
    whole = head(params, HIDDEN)[1] - params["score"]["bias"]
    want = np.array([11.0, 12.0]) @ np.asarray(params["score"]["kernel"])
    np.testing.assert_allclose(whole, want, rtol=1e-4, atol=1e-6)
    assert heads.remove(params) == {}


def test_refusals(key, pretrained):
    params = heads.add(pretrained.params, Head(3), 24, key)
    assert params["score"]["kernel"].shape == (24, 3)
    with pytest.raises(ValueError, match="head at score/ already"):
        heads.add(params, Head(2), 24, key)
    with pytest.raises(ValueError, match="no score/kernel"):
        Head(2)({}, HIDDEN)
    with pytest.raises(ValueError, match="has 3 outputs, the head says 2"):
        Head(2)(heads.add({}, Head(3), 2, key), HIDDEN)
    batch = {"tokens": jnp.ones((2, 3), jnp.int32), "labels": jnp.ones(2), "weights": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"labels are \(2,\), expected \(2, 3\)"):
        regress(pretrained.model, Head(3))(params, None, batch, None)


def test_a_model_with_a_head_is_split_over_a_mesh(key, pretrained):
    head = Head(2, bias=True)
    model = pretrained.model
    params = heads.add(pretrained.params, head, model.config.width, key)
    names = decoder.axes(model) | heads.axes(head)
    placed, _ = shardings(names, params, make_mesh(fsdp=2, tensor=2))
    assert placed["score"]["kernel"].spec == PartitionSpec("fsdp", None)
    assert placed["score"]["bias"].spec == PartitionSpec(None)


def test_a_head_is_not_lost_in_a_saved_model(key, pretrained, tmp_path):
    params = heads.add(pretrained.params, Head(2), pretrained.model.config.width, key)
    with pytest.raises(ValueError, match="score/kernel"):
        hub.save(tmp_path / "saved", dataclasses.replace(pretrained, params=params))
    assert not (tmp_path / "saved").exists()
