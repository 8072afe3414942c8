"""The trunk: scanned, unscanned, cached, packed and padded forms are one function."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.mask import Mask
from research.kernels.select import kernel_name
from research.models import arrange, decoder
from research.models.families.llama import llama
from research.models.layers import GatedMlp
from research.paths import named_leaves
from research.weights import lora

CONFIG = llama(50, 3, 24, 6, 2, 32, head_size=8, max_length=64, init_std=0.4)
MODEL = decoder.Decoder(CONFIG)


@pytest.fixture(scope="module")
def params():
    fresh = decoder.init(MODEL, jax.random.key(0))
    return jax.tree.map(lambda w: w * 10 if w.ndim == 3 else w, fresh)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 11), 0, 50)


@partial(jax.jit, static_argnames=("model", "method"))
def apply(params, tokens, model=MODEL, **more):
    return model.apply({"params": params}, tokens, **more)


def test_unstacking_can_give_the_stacks_up(params, tokens):
    given = jax.tree.map(jnp.copy, params)
    split = decoder.unstack(given, donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given["stack_0"]))
    np.testing.assert_array_equal(apply(split, tokens), apply(decoder.unstack(params), tokens))
    again = decoder.unstack(split, donate=True)  # nothing to split, nothing given up
    np.testing.assert_array_equal(apply(again, tokens), apply(split, tokens))
    on_host = jax.tree.map(np.asarray, params)
    np.testing.assert_array_equal(
        apply(decoder.unstack(on_host, donate=True), tokens), apply(split, tokens)
    )


def test_restack_is_the_inverse_of_unstack(params):
    tuned = lora.add(params, r".*/q/kernel", jax.random.key(1), rank=2)
    again = decoder.restack(decoder.unstack(tuned))
    assert jax.tree.structure(again) == jax.tree.structure(tuned)
    jax.tree.map(np.testing.assert_array_equal, again, tuned)


def test_unscanned_and_unstacked_equal_scanned(params, tokens):
    want = apply(params, tokens)
    loop = decoder.Decoder(dataclasses.replace(CONFIG, scan=False))
    np.testing.assert_allclose(apply(params, tokens, loop), want, atol=1e-5)
    np.testing.assert_allclose(apply(decoder.unstack(params), tokens), want, atol=1e-5)


def test_embeddings_are_scaled_where_they_are_read_and_not_in_a_tied_head(params, tokens):
    scaled = decoder.Decoder(dataclasses.replace(CONFIG, embed_scale=3.0))
    larger = {**params, "embed": {"table": params["embed"]["table"] * 3}}
    np.testing.assert_allclose(apply(params, tokens, scaled), apply(larger, tokens), atol=1e-5)
    tied = dataclasses.replace(CONFIG, head=None)
    params = {name: node for name, node in params.items() if name != "head"}
    states = apply(params, tokens, decoder.Decoder(tied), method="hidden")
    shrunk = {**params, "embed": {"table": params["embed"]["table"] / 3}}
    got = apply(shrunk, tokens, decoder.Decoder(dataclasses.replace(tied, embed_scale=3.0)))
    np.testing.assert_allclose(got, states @ shrunk["embed"]["table"].T, atol=1e-4)


def test_parameters_that_no_part_reads_are_refused_by_name(params, tokens):
    tied = decoder.Decoder(dataclasses.replace(CONFIG, head=None))
    with pytest.raises(ValueError, match=r"a Decoder does not read the parameters \['head'\]"):
        apply(params, tokens, tied)


def test_runs_without_jit(params, tokens):
    loop = decoder.Decoder(dataclasses.replace(CONFIG, scan=False))
    with jax.disable_jit():
        np.testing.assert_allclose(apply(params, tokens, loop), apply(params, tokens), atol=1e-5)


@pytest.mark.parametrize(
    "remat", ["full", jax.checkpoint_policies.dots_with_no_batch_dims_saveable]
)
@pytest.mark.parametrize("scan", [True, False])
def test_rematerialised_gradients_are_the_same(params, tokens, remat, scan):
    def loss(params, model):
        return (apply(params, tokens, model) ** 2).mean()

    want = jax.grad(loss)(params, MODEL)
    other = decoder.Decoder(dataclasses.replace(CONFIG, remat=remat, scan=scan))
    got = jax.grad(loss)(params, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


@pytest.mark.parametrize("stacked", [True, False])
def test_cached_decoding_equals_the_full_forward_at_every_step(params, tokens, stacked):
    want = apply(params, tokens)
    tree = params if stacked else decoder.unstack(params)
    cache = decoder.empty_cache(MODEL, 2, 16, stacked=stacked)
    logits, cache = apply(tree, tokens[:, :4], cache=cache)
    parts = [logits]
    for t in range(4, 11):
        logits, cache = apply(tree, tokens[:, t : t + 1], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-5)
    assert int(cache.index) == 11 and list(cache.lengths) == [11, 11]


def test_left_padded_cache_equals_the_unpadded_row(params, tokens):
    padded = jnp.concatenate([jnp.zeros((2, 3), jnp.int32), tokens[:, :5]], axis=1)
    segments = jnp.array([[0] * 3 + [1] * 5, [1] * 8])
    cache = decoder.empty_cache(MODEL, 2, 16)
    logits, cache = apply(params, padded, segment_ids=segments, cache=cache)
    np.testing.assert_allclose(logits[0, 3:], apply(params, tokens[:1, :5])[0], atol=1e-5)
    more, cache = apply(params, tokens[:, 5:6], cache=cache)
    np.testing.assert_allclose(more[0, 0], apply(params, tokens[:1, :6])[0, -1], atol=1e-5)
    assert list(cache.lengths) == [6, 9]


def test_packed_equals_separate(params, tokens):
    packed = jnp.concatenate([tokens[0, :7], tokens[1, :4], jnp.zeros(3, jnp.int32)])[None]
    segments = jnp.array([[1] * 7 + [2] * 4 + [0] * 3])
    logits = apply(params, packed, segment_ids=segments)[0]
    np.testing.assert_allclose(logits[:7], apply(params, tokens[:1, :7])[0], atol=1e-5)
    np.testing.assert_allclose(logits[7:11], apply(params, tokens[1:, :4])[0], atol=1e-5)
    assert np.abs(apply(params, packed)[0, 7:11] - logits[7:11]).max() > 1e-2  # leaks otherwise


def test_packed_equals_separate_in_gradients(params, tokens):
    """The sum of squares of all real logits, of two texts in one row and in two."""
    packed = jnp.concatenate([tokens[0, :7], tokens[1, :4], jnp.zeros(3, jnp.int32)])[None]
    segments = jnp.array([[1] * 7 + [2] * 4 + [0] * 3])

    def together(params):
        return (apply(params, packed, segment_ids=segments)[0, :11] ** 2).sum()

    def apart(params):
        parts = apply(params, tokens[:1, :7]), apply(params, tokens[1:, :4])
        return sum((part**2).sum() for part in parts)

    for (name, got), (_, want) in zip(
        named_leaves(jax.grad(together)(params)), named_leaves(jax.grad(apart)(params)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_padding_changes_nothing_that_is_real(params, tokens):
    padded = jnp.pad(tokens, ((0, 0), (0, 4)), constant_values=9)
    segments = jnp.pad(jnp.ones_like(tokens), ((0, 0), (0, 4)))
    got = apply(params, padded, segment_ids=segments)[:, :11]
    np.testing.assert_allclose(got, apply(params, tokens), atol=1e-6)


def test_segment_positions_by_hand():
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 3, 3, 3]])
    want = [[0, 1, 0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0, 1, 2]]
    np.testing.assert_array_equal(arrange.segment_positions(segments), want)


def test_hidden_and_project_are_the_two_halves(params, tokens):
    states = apply(params, tokens, method="hidden")
    assert states.shape == (2, 11, 24)
    logits = MODEL.apply({"params": {"head": params["head"]}}, states, method="project")
    np.testing.assert_array_equal(logits, apply(params, tokens))


def test_a_component_is_an_ablation(params, tokens):
    """A pattern of two different blocks, one of them with a window, is still one trunk."""
    block = CONFIG.stacks[0].pattern[0]
    local = block.clone(attention=block.attention.clone(window=3), ffn=GatedMlp(16))
    stacks = (decoder.Stack(2, (block, local)), decoder.Stack(1, (block,)))
    model = decoder.Decoder(dataclasses.replace(CONFIG, stacks=stacks))
    tree = decoder.init(model, jax.random.key(3))
    assert tree["stack_0"]["block_1"]["ffn"]["up"]["kernel"].shape == (2, 24, 16)
    want = apply(tree, tokens, model)
    loop = decoder.Decoder(dataclasses.replace(CONFIG, stacks=stacks, scan=False))
    np.testing.assert_allclose(apply(tree, tokens, loop), want, atol=1e-5)
    cache = decoder.empty_cache(model, 2, 11)
    logits, _ = apply(tree, tokens, model, cache=cache)
    np.testing.assert_allclose(logits, want, atol=1e-5)


def test_axes_mirror_the_parameters(params):
    names = decoder.axes(MODEL)
    flat = jax.tree.leaves(
        jax.tree.map(
            lambda w, n: len(n) == w.ndim, params, names, is_leaf=lambda n: isinstance(n, tuple)
        )
    )
    assert all(flat)
    assert names["stack_0"]["block_0"]["ffn"]["down"]["kernel"] == ("layers", "ffn", "embed")


def test_attention_kernel_is_part_of_the_config(params, tokens):
    calls = []

    def spy(q, k, v, mask, scale=None):
        calls.append(q.shape)
        return reference(q, k, v, mask, scale)

    apply(params, tokens, decoder.Decoder(dataclasses.replace(CONFIG, attend=spy)))
    assert calls and calls[0] == (2, 11, 6, 8)


def test_wrong_shape_names_the_parameter(params, tokens):
    broken = jax.tree.map(lambda w: w, params)
    broken["stack_0"]["block_0"]["ffn"]["up"]["kernel"] = jnp.zeros((3, 24, 31))
    with pytest.raises(ValueError, match=r"ffn/up/kernel' has shape \(24, 31\), the config says"):
        apply(broken, tokens)


def test_bfloat16_computes_in_bfloat16(params, tokens):
    model = decoder.Decoder(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
    assert apply(params, tokens, model, method="hidden").dtype == jnp.bfloat16
    logits = apply(params, tokens, model)
    assert logits.dtype == jnp.float32
    assert np.corrcoef(logits.ravel(), apply(params, tokens).ravel())[0, 1] > 0.99


def test_the_callers_mask_counts(params, tokens):
    slopes = apply(params, tokens, mask=Mask(slopes=jnp.full(6, 0.5)))
    assert np.abs(slopes - apply(params, tokens)).max() > 1e-2
    segments = jnp.ones_like(tokens)
    mask = Mask(query_segments=segments, key_segments=segments)
    with pytest.raises(ValueError, match="segments come from `segment_ids`"):
        MODEL.apply({"params": params}, tokens, mask=mask, segment_ids=segments)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("form", ["scanned", "loop", "unstacked"])
def test_another_number_of_layers_is_an_error(params, tokens, count, form):
    stacks = (dataclasses.replace(CONFIG.stacks[0], count=count),)
    model = decoder.Decoder(dataclasses.replace(CONFIG, stacks=stacks, scan=form == "scanned"))
    tree = decoder.unstack(params) if form == "unstacked" else params
    with pytest.raises(
        ValueError, match=f"a stack of {count} layers was given the parameters of 3"
    ):
        model.apply({"params": tree}, tokens)


def test_a_full_cache_and_mixed_head_sizes_are_errors(params, tokens):
    _, cache = apply(params, tokens[:, :8], cache=decoder.empty_cache(MODEL, 2, 8))
    with pytest.raises(ValueError, match="holds 8 of 8 tokens, no room for 1"):
        MODEL.apply({"params": params}, tokens[:, 8:9], cache=cache)
    block = CONFIG.stacks[0].pattern[0]
    other = block.clone(attention=block.attention.clone(head_size=4))
    stacks = (decoder.Stack(1, (block, other)),)
    with pytest.raises(ValueError, match=r"share a head size, these have \[4, 8\]"):
        decoder.init(decoder.Decoder(dataclasses.replace(CONFIG, stacks=stacks)), jax.random.key(0))


def test_attention_in_tiles_in_a_cache_with_left_padding(params):
    """Long enough that the default kernel is not the reference form."""
    tokens = jax.random.randint(jax.random.key(5), (2, 40), 0, 50)
    segments = jnp.ones_like(tokens).at[0, :7].set(0)
    assert kernel_name(40, 72) != "reference"
    cache = decoder.empty_cache(MODEL, 2, 72)
    logits, cache = apply(params, tokens[:, :24], segment_ids=segments[:, :24], cache=cache)
    more, _ = apply(params, tokens[:, 24:], segment_ids=segments[:, 24:], cache=cache)
    got = jnp.concatenate([logits, more], axis=1)
    plain = decoder.Decoder(dataclasses.replace(CONFIG, attend=reference))
    np.testing.assert_allclose(got[1], apply(params, tokens, plain)[1], atol=2e-5)
    np.testing.assert_allclose(got[0, 7:], apply(params, tokens[:1, 7:], plain)[0], atol=2e-5)
