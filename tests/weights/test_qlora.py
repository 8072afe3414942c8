"""LoRA over NF4 is QLoRA: against LoRA over the dequantized matrices, and what a step of it takes."""

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
from research.weights.quantized import bits_per_parameter, encode, quantize

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


WIDTH, FFN, LAYERS = 256, 512, 6


def temporaries(double, dtype, remat):
    """Bytes of temporaries of a compiled step of LoRA on all kernels, with a base in few bits or not."""
    config = llama(64, LAYERS, WIDTH, 2, 2, FFN, tied=True, dtype=dtype, remat=remat)
    model = decoder.Decoder(config)

    def start(key):
        params = jax.tree.map(lambda w: w.astype(dtype), decoder.init(model, key))
        if double:
            format = Codebook(double=True)
            params = base.change(params, r".*/kernel", lambda _, w, n: encode(w.mT, format, True))
            assert bits_per_parameter(params) <= 4.2
        return lora.add(params, r".*/kernel", key, 4)

    def step(trainable, frozen, tokens):
        def total(trainable):
            return jnp.square(model.apply({"params": combine(trainable, frozen)}, tokens)).mean()

        gradient = jax.grad(total)(trainable)
        return jax.tree.map(lambda x, g: x - 0.1 * g, trainable, gradient)

    trainable, frozen = partition(jax.eval_shape(start, jax.random.key(0)), lora.TRAINABLE)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(trainable, frozen, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", [None, "full"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_scanned_step_holds_at_most_one_layer_in_full_beyond_that_of_lora(dtype, remat):
    """XLA's CPU backend keeps bfloat16 matrices of all layers in float32, so that there float32 is
    the stricter bound. The numbers are the same with and without its optimizations."""
    layer = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
    plain, quantized = (temporaries(double, dtype, remat) for double in (False, True))
    assert quantized - plain <= layer
    assert quantized < 3 * layer < LAYERS * layer
