"""The first layers are those of the whole model, and go back where they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shared.first_layers import first_layers, put_back
from research.hub.pretrained import Pretrained
from research.models import decoder
from research.models.families.llama import llama
from research.models.stack import Stack

TOKENS = jnp.arange(6)[None]


@pytest.fixture(scope="module")
def whole():
    model = decoder.Decoder(llama(32, 3, 16, 4, 2, 24, tied=True))
    params = decoder.init(model, jax.random.key(0))
    return Pretrained(model, params, None, {"num_hidden_layers": 3})


def test_the_first_layers_compute_what_the_whole_model_has_after_them(whole):
    small = first_layers(whole, 2)
    silent = jax.tree.map(lambda leaf: leaf.copy(), whole.params)
    block = silent["stack_0"]["block_0"]
    for sublayer, name in (("attention", "o"), ("ffn", "down")):  # the third layer adds nothing
        kernel = block[sublayer][name]["kernel"]
        block[sublayer][name] = {"kernel": kernel.at[2].set(0)}
    np.testing.assert_allclose(
        small.logits(TOKENS),
        whole.model.apply({"params": silent}, TOKENS),
        rtol=1e-5,
        atol=1e-6,
    )
    assert small.config["num_hidden_layers"] == small.model.config.layers == 2


def test_back_in_place_the_whole_model_is_as_it_was_or_as_it_was_tuned(whole):
    small = first_layers(whole, 2)
    same = put_back(whole.params, small.params)
    assert jax.tree.structure(same) == jax.tree.structure(whole.params)
    assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(whole.params)))
    tuned = put_back(whole.params, jax.tree.map(lambda leaf: leaf + 1, small.params))
    table, scale = tuned["embed"]["table"], tuned["final_norm"]["scale"]
    np.testing.assert_array_equal(table, whole.params["embed"]["table"] + 1)
    np.testing.assert_array_equal(scale, whole.params["final_norm"]["scale"])
    gate = tuned["stack_0"]["block_0"]["ffn"]["gate"]["kernel"]
    was = whole.params["stack_0"]["block_0"]["ffn"]["gate"]["kernel"]
    np.testing.assert_array_equal(gate, jnp.concatenate([was[:2] + 1, was[2:]]))


def test_other_counts_and_other_trunks_are_refused(whole):
    for count in (0, 4):
        with pytest.raises(ValueError, match=r"in 1\.\.3"):
            first_layers(whole, count)
    block = whole.model.config.stacks[0].pattern[0]
    config = whole.model.config.__class__(32, 16, (Stack(1, (block, block)),), 8)
    other = Pretrained(decoder.Decoder(config), whole.params, None, {})
    with pytest.raises(ValueError, match="one stack of one repeated block"):
        first_layers(other, 1)
