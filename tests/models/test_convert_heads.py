"""Multi-head to grouped-query attention by pooling heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import decoder
from research.models.convert_heads import Fresh, first, group_heads, mean
from research.models.families.llama import llama
from research.models.linear_attention import LinearAttention
from research.weights import lora

CONFIG = llama(50, 3, 24, 6, 6, 32, head_size=8, max_length=16, attention_bias=True)
TOKENS = jnp.arange(10)[None]
KERNEL = ("stack_0", "block_0", "attention", "k", "kernel")


@pytest.fixture(scope="module")
def params():
    fresh = decoder.init(decoder.Decoder(CONFIG), jax.random.key(0))
    return jax.tree.map(
        lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape), fresh
    )


def leaf(params, *path):
    for name in path:
        params = params[name]
    return params


def logits(config, params):
    return decoder.Decoder(config).apply({"params": params}, TOKENS)


@pytest.mark.parametrize("pool", [mean, first])
def test_the_same_number_is_the_identity(params, pool):
    config, same = group_heads(CONFIG, params, 6, pool)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("pool", [mean, first])
def test_equal_heads_lose_nothing(params, kv_heads, pool):
    """Copies of a head pool to the head; so a grouped model repeated and pooled is itself."""
    small = llama(50, 3, 24, 6, kv_heads, 32, head_size=8, max_length=16, attention_bias=True)
    want = decoder.init(decoder.Decoder(small), jax.random.key(3))

    def repeat(path, w):
        if any(getattr(key, "key", None) in ("k", "v") for key in path):
            heads = w.reshape(*w.shape[:-1], kv_heads, 8)
            return jnp.repeat(heads, 6 // kv_heads, axis=-2).reshape(*w.shape[:-1], 48)
        return w

    many = jax.tree_util.tree_map_with_path(repeat, want)
    np.testing.assert_allclose(logits(CONFIG, many), logits(small, want), atol=1e-5)
    config, got = group_heads(CONFIG, many, kv_heads, pool)
    assert config == small
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), got, want)


def test_heads_by_hand(params):
    heads = np.array(leaf(params, *KERNEL)).reshape(3, 24, 6, 8)
    _, meaned = group_heads(CONFIG, params, 2)
    want = [heads[:, :, :3].sum(2) / 3, heads[:, :, 3:].sum(2) / 3]
    np.testing.assert_allclose(leaf(meaned, *KERNEL), np.concatenate(want, -1), atol=1e-6)
    _, firsts = group_heads(CONFIG, params, 2, first)
    want = np.concatenate([heads[:, :, 0], heads[:, :, 3]], -1)
    np.testing.assert_array_equal(leaf(firsts, *KERNEL), want)
    bias = np.array(leaf(params, *KERNEL[:-1], "bias")).reshape(3, 6, 8)
    np.testing.assert_allclose(
        leaf(meaned, *KERNEL[:-1], "bias")[:, :8], bias[:, :3].mean(1), atol=1e-6
    )
    np.testing.assert_array_equal(
        meaned["stack_0"]["block_0"]["ffn"]["up"]["kernel"],
        params["stack_0"]["block_0"]["ffn"]["up"]["kernel"],
    )


def test_fresh_heads_are_of_the_seed_and_not_of_the_old_ones(params):
    config, got = group_heads(CONFIG, params, 2, Fresh(1))
    _, again = group_heads(CONFIG, jax.tree.map(lambda w: w + 1, params), 2, Fresh(1))
    _, other = group_heads(CONFIG, params, 2, Fresh(2))
    kernel = leaf(got, *KERNEL)
    np.testing.assert_array_equal(leaf(again, *KERNEL), kernel)
    assert np.abs(leaf(other, *KERNEL) - kernel).max() > 0.01
    assert abs(float(kernel.std()) - 0.02) < 0.002
    assert not leaf(got, *KERNEL[:-1], "bias").any()
    values = leaf(got, *KERNEL[:3], "v", "kernel")
    assert np.abs(values - kernel).max() > 0.01
    assert logits(config, got).shape == (1, 10, 50)


def test_errors_name_the_layer(params):
    with pytest.raises(
        ValueError, match="stack_0/block_0: Attention of 6 key/value heads cannot be grouped into 4"
    ):
        group_heads(CONFIG, params, 4)
    block = CONFIG.stacks[0].pattern[0].clone(attention=LinearAttention(6, 6, 8))
    linear = dataclasses.replace(CONFIG, stacks=(decoder.Stack(3, (block,)),))
    with pytest.raises(
        ValueError, match="LinearAttention of 6 key/value heads cannot be grouped into 2"
    ):
        group_heads(linear, params, 2)
    adapted = lora.add(params, r".*/attention/k/kernel", jax.random.key(0), rank=2)
    with pytest.raises(
        ValueError, match="attention/k/kernel: expected a stacked array, found LoRA"
    ):
        group_heads(CONFIG, adapted, 2)
    with pytest.raises(ValueError, match="expected a stacked array"):
        group_heads(CONFIG, decoder.unstack(params), 2)
