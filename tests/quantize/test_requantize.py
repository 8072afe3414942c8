"""Merging into few bits again: what stays bitwise, and how far the rest may move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.quantize.requantize import quantized_in, requantize
from research.weights import base, bias, int8, lora
from research.weights.formats import Codebook, Integer
from research.weights.quantized import is_quantized, quantize

FORMATS = {"layer/kernel": Codebook(group=16), "embed/table": Integer(4, 16, "minimum")}


@pytest.fixture(scope="module")
def small():
    one, two = jax.random.split(jax.random.key(0))
    params = {
        "layer": {"kernel": jax.random.normal(one, (3, 32, 48))},
        "embed": {"table": jax.random.normal(two, (40, 16))},
        "norm": {"scale": jnp.ones(16)},
    }
    for rule, format in FORMATS.items():
        params = quantize(params, rule, format)
    return params


def adapted(params, size):
    params = lora.add(params, "layer/kernel|embed/table", jax.random.key(1), rank=4)

    def move(name, w, number):
        return w.replace(
            a=w.a + size, b=w.b + size * jax.random.normal(jax.random.key(2), w.b.shape)
        )

    return base.change(params, "layer/kernel|embed/table", move)


def test_an_adapter_that_learned_nothing_gives_the_base_back(small):
    again = requantize(lora.add(small, "layer/kernel", jax.random.key(1), rank=4))
    jax.tree.map(np.testing.assert_array_equal, again, small)
    assert requantize(small)["embed"]["table"] is small["embed"]["table"]


def test_the_merged_matrix_is_kept_within_half_a_step(small):
    tuned = adapted(small, 0.1)
    merged, again = base.merge(tuned), requantize(tuned)
    kernel, table = again["layer"]["kernel"], again["embed"]["table"]
    assert kernel.format == FORMATS["layer/kernel"] and table.format == FORMATS["embed/table"]
    for name in ("layer", "embed"):
        (dense,), (node,) = merged[name].values(), again[name].values()
        rows = dense.mT if node.transposed else dense
        # The widest gap of NF4 is 0.304 of the largest magnitude.
        step = 0.304 if name == "layer" else 1.0
        most = step / 2 * np.repeat(node.scale, 16, axis=-1)
        off = np.abs(node.values() - rows)
        assert (off <= most * 1.001 + 1e-6).all() and off.max() > 0.1 * most.max()
        (before,) = small[name].values()
        assert not np.array_equal(node.codes, before.codes)
    assert again["norm"]["scale"] is tuned["norm"]["scale"]


def test_an_adapter_on_a_dense_matrix_becomes_dense(small):
    params = {"a": {"kernel": jax.random.normal(jax.random.key(3), (16, 8))}}
    tuned = lora.add(params, "a/kernel", jax.random.key(1), rank=2)
    found = requantize(tuned)["a"]["kernel"]
    assert not base.is_weight(found) and quantized_in(tuned["a"]["kernel"]) is None
    np.testing.assert_array_equal(found, tuned["a"]["kernel"].dense())
    assert is_quantized(quantized_in(adapted(small, 0.1)["layer"]["kernel"]))


def test_what_no_matrix_can_say_is_refused_by_name(small):
    with pytest.raises(ValueError, match="layer/kernel cannot be merged"):
        requantize(bias.add(small, "layer/kernel"))
    broken = adapted(small, jnp.nan)
    with pytest.raises(ValueError, match=r"(embed/table|layer/kernel) .* holds nan or inf"):
        requantize(broken)


def test_rounded_inputs_are_not_dropped_silently(small):
    rounded = int8.add(small, "layer/kernel")
    for params in (rounded, lora.add(rounded, "layer/kernel", jax.random.key(1), rank=2)):
        with pytest.raises(ValueError, match="layer/kernel: its inputs are rounded too"):
            requantize(params)
