"""LoRA over NF4 is QLoRA: against LoRA over the dequantized matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.train.partition import combine, partition
from research.weights import base, lora
from research.weights.formats import Codebook
from research.weights.quantized import quantize

MODEL = decoder.Decoder(llama(32, 2, 32, 2, 2, 32, tied=True, init_std=0.2))
ALL = r".*/kernel|embed/table"
NF4 = Codebook(group=16, double=True)
TOKENS = np.random.default_rng(0).integers(0, 32, size=(8, 9)).astype(np.int32)[:, :-1]


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


def moved(params, rule, key):
    """`params` whose trained leaves are not where they began."""
    trainable, frozen = partition(params, rule)
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(key, len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return combine(jax.tree.unflatten(tree, leaves), frozen)


def close(got, want):
    for (name, x), (_, y) in zip(named_leaves(got), named_leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


def test_it_is_lora_over_the_dequantized_matrices(params):
    quantized = quantize(params, ALL, NF4)

    @jax.jit
    def logits_and_gradients(trainable, frozen):
        def total(trainable):
            logits = MODEL.apply({"params": combine(trainable, frozen)}, TOKENS)
            return jnp.square(logits).mean(), logits

        return jax.grad(total, has_aux=True)(trainable)

    found = []
    for tree in (quantized, base.merge(quantized)):
        tree = moved(
            lora.add(tree, ALL, jax.random.key(1), 4, 8), lora.TRAINABLE, jax.random.key(2)
        )
        found.append(logits_and_gradients(*partition(tree, lora.TRAINABLE)))
    close(*found)
    factors = named_leaves(found[0][0])
    assert len(factors) == 16 and all(np.abs(leaf).max() > 1e-3 for _, leaf in factors)
    full = MODEL.apply({"params": params}, TOKENS)
    assert np.abs(found[0][1] - full).max() > 0.01
