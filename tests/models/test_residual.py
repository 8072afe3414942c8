"""Residual connections and how parameters begin: pre-norm, post-norm, DeepNorm."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import decoder
from research.models.block import DeepNorm, deep_norm, deep_norm_init, post_norm, pre_norm
from research.models.families.gpt import gpt
from research.models.families.llama import llama
from research.models.init import Normal, Xavier, begin
from research.paths import RuleError

init = jax.jit(decoder.init, static_argnums=0)


def halve(x):
    """A norm that is easy to follow."""
    return x / 2


def square(x):
    return x * x


def test_by_hand():
    x = jnp.array([2.0, 6.0])
    np.testing.assert_array_equal(pre_norm(halve, square, x), [2 + 1, 6 + 9])
    np.testing.assert_array_equal(post_norm(halve, square, x), [(2 + 4) / 2, (6 + 36) / 2])
    np.testing.assert_array_equal(DeepNorm(3.0)(halve, square, x), [(6 + 4) / 2, (18 + 36) / 2])
    np.testing.assert_array_equal(DeepNorm(1.0)(halve, square, x), post_norm(halve, square, x))


def test_deep_norm_of_eight_layers_by_hand():
    """alpha = 16^(1/4) = 2, beta = 64^(-1/4) = 1 / sqrt(8)."""
    assert deep_norm(8) == DeepNorm(2.0)
    gains = {draw.gain for _, draw in deep_norm_init(8)}
    assert sorted(gains) == pytest.approx([8**-0.5, 1.0])


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_deep_norm_begins_with_xavier_of_both_gains(key, family):
    if family == "gpt":
        config = gpt(50, 8, 48, 4, 16, residual=deep_norm(8), ffn=96)
    else:
        config = llama(50, 8, 48, 4, 2, 96)
    config = dataclasses.replace(config, init_rules=deep_norm_init(8))
    params = init(decoder.Decoder(config), key)
    block = params["stack_0"]["block_0"]
    for part in ("attention", "ffn"):
        for name, layer in block[part].items():
            inner, outer = layer["kernel"].shape[-2:]
            gain = 1 if name in "qk" else 8**-0.5
            want = gain * (2 / (inner + outer)) ** 0.5
            assert np.std(layer["kernel"]) == pytest.approx(want, rel=0.03), name
    assert np.std(params["embed"]["table"]) == pytest.approx(0.02, rel=0.1)


def test_a_post_norm_trunk_has_no_final_norm_and_ends_normalised(key):
    tokens = jax.random.randint(key, (2, 5), 0, 50)
    for residual in (post_norm, deep_norm(3)):
        model = decoder.Decoder(gpt(50, 3, 24, 3, 16, residual=residual))
        params = init(model, key)
        assert "final_norm" not in params
        states = jax.jit(partial(model.apply, method="hidden"))({"params": params}, tokens)
        np.testing.assert_allclose(states.mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(states.std(-1), 1, atol=1e-3)


def test_deep_norm_changes_less_per_step_than_post_norm(key):
    """What it is for: at the same depth the first layer's share of the last state is larger."""
    tokens = jax.random.randint(key, (1, 5), 0, 50)

    def kept(residual, rules):
        config = gpt(50, 24, 32, 4, 16, residual=residual, init_std=1.0, init_rules=rules)
        model = decoder.Decoder(config)
        params = init(model, key)
        first = params["embed"]["table"][tokens] + params["position"]["table"][:5]
        last = jax.jit(partial(model.apply, method="hidden"))({"params": params}, tokens)
        return np.corrcoef(first.ravel(), last.ravel())[0, 1]

    xavier = ((r"stack_.*/kernel", Xavier()),)
    assert kept(deep_norm(24), deep_norm_init(24)) > 0.6 > 0.3 > abs(kept(post_norm, xavier))


def test_rules_are_by_first_match_and_must_match(key):
    params = {
        "a": {"kernel": jnp.ones((3, 8, 8))},
        "b": {"kernel": jnp.ones(4), "bias": jnp.ones(2)},
    }
    begun = begin(params, (("a/.*", Normal(0.5)), (".*/kernel", Normal(0.0))), key)
    assert np.std(begun["a"]["kernel"]) == pytest.approx(0.5, rel=0.15)
    assert not begun["b"]["kernel"].any()
    np.testing.assert_array_equal(begun["b"]["bias"], params["b"]["bias"])
    alone = begin({"a": params["a"]}, (("a/.*", Normal(0.5)),), key)
    np.testing.assert_array_equal(alone["a"]["kernel"], begun["a"]["kernel"])
    with pytest.raises(RuleError, match=r"'c/\.\*' matches none of 3 paths"):
        begin(params, (("c/.*", Normal(0.5)),), key)
