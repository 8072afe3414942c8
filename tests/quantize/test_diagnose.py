"""A model broken in one way has this finding and no other; a healthy one has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.quantize import loftq
from research.quantize.diagnose import diagnose, text
from research.weights import adalora, base, dora, lora
from research.weights.formats import Codebook
from research.weights.quantized import quantize

NF4 = Codebook(group=16, double=True)
PATH = "layer/kernel"


@pytest.fixture(scope="module")
def dense():
    kernel = jax.random.normal(jax.random.key(0), (2, 64, 32))
    return {"layer": {"kernel": kernel}, "norm": {"scale": jnp.ones(4)}}


@pytest.fixture(scope="module")
def start(dense):
    return lora.add(quantize(dense, PATH, NF4), PATH, jax.random.key(1), rank=4)


def change(params, of):
    return base.change(params, PATH, lambda name, w, number: of(w))


@pytest.fixture(scope="module")
def healthy(start):
    b = 0.02 * jax.random.normal(jax.random.key(2), (2, 4, 32))
    return change(start, lambda w: w.replace(a=w.a + 0.01, b=b))


def found(*arguments, **others):
    """{(path, layer): findings}, of what has some."""
    rows = diagnose(*arguments, **others)
    return {(row.path, row.layer): row.findings for row in rows if row.findings}


def only(name):
    return {(PATH, 1): (name,)}


def test_a_healthy_run_has_numbers_and_no_finding(dense, start, healthy):
    rows = diagnose(healthy, start, dense)
    assert [(row.path, row.layer, row.findings) for row in rows] == [(PATH, 0, ()), (PATH, 1, ())]
    kernel, node = dense["layer"]["kernel"][1], healthy["layer"]["kernel"]
    off = np.linalg.norm(node.base.dense()[1] - kernel) / np.linalg.norm(kernel)
    np.testing.assert_allclose(rows[1].error, off, rtol=1e-4)
    size = np.linalg.norm(node.a[1] @ node.b[1]) / np.linalg.norm(node.base.dense()[1])
    np.testing.assert_allclose(rows[1].update, size, rtol=1e-4)
    assert 1 < rows[1].outlier < 4 and 0 <= rows[1].at_ends < 0.05
    assert text(rows).startswith("no finding\n") and PATH in text(rows)
    for module in (dora, adalora):
        tuned = module.add(quantize(dense, PATH, NF4), PATH, jax.random.key(1), rank=4)
        tuned = change(tuned, lambda w: w.replace(b=w.b + 0.02))
        if module is adalora:
            tuned = change(tuned, lambda w: w.replace(e=w.e + 0.5))
        assert found(tuned, None, dense) == {}
    fitted = loftq.add(dense, PATH, jax.random.key(1), 4, NF4, steps=2)
    assert found(fitted, None, dense) == {}
    (row, _) = diagnose(fitted, fitted, dense)
    assert row.error < rows[0].error and row.findings == ("dead factors",)


def test_a_matrix_that_is_not_the_model_s(dense, start, healthy):
    other = dense["layer"]["kernel"].at[1].multiply(2)
    wrong = {**dense, "layer": {"kernel": other}}
    assert found(healthy, start, wrong) == only("quantization error")


def test_factors_that_did_not_learn(dense, start, healthy):
    still = change(healthy, lambda w: w.replace(b=w.b.at[1].set(0)))
    assert found(still, None, dense) == only("dead factors")
    first = start["layer"]["kernel"].a
    still = change(healthy, lambda w: w.replace(a=w.a.at[1].set(first[1])))
    assert found(still, None, dense) == {}
    assert found(still, start, dense) == only("dead factors")
    assert text(diagnose(still, start)).startswith(f"dead factors: {PATH}, layers 1\n")


def test_factors_that_outgrow_their_matrix(dense, start, healthy):
    huge = change(healthy, lambda w: w.replace(b=w.b.at[1].multiply(1e3)))
    assert found(huge, start, dense) == only("exploding factors")


def test_scales_at_the_ends_of_their_range(start, healthy):
    def saturate(w):
        codes = w.base.scale.codes.at[1, ::2].set(255)
        return w.replace(base=w.base.replace(scale=w.base.scale.replace(codes=codes)))

    broken = change(healthy, saturate)
    assert found(broken, start) == only("saturated scales")


def test_scales_below_zero(start, healthy):
    def sink(w):
        offset = w.base.scale.offset.at[1].add(-100)
        return w.replace(base=w.base.replace(scale=w.base.scale.replace(offset=offset)))

    assert found(change(healthy, sink), start) == only("negative scales")


def test_a_weight_that_is_far_from_the_others(dense, healthy):
    kernel = dense["layer"]["kernel"].at[1, 5, 7].set(1000.0)
    params = {**dense, "layer": {"kernel": kernel}}
    node = quantize(params, PATH, Codebook(group=16))["layer"]["kernel"]
    outlier = change(healthy, lambda w: w.replace(base=node))
    assert found(outlier, None, params) == only("absmax outlier")


def test_numbers_that_are_none(dense, start, healthy):
    broken = change(healthy, lambda w: w.replace(b=w.b.at[1, 0, 0].set(jnp.nan)))
    assert found(broken, start, dense) == only("not finite")
    broken = {**healthy, "norm": {"scale": jnp.array([1, 1, jnp.inf, 1])}}
    assert found(broken, start, dense) == {("norm/scale", None): ("not finite",)}
    assert text(diagnose(broken)).startswith("not finite: norm/scale\n")


def test_trees_of_other_models_are_refused(healthy):
    with pytest.raises(ValueError, match="has no layer/kernel"):
        diagnose(healthy, reference={"norm": {"scale": jnp.ones(4)}})
