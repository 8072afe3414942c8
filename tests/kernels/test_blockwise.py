"""Blockwise attention against the reference form: values, gradients, memory, what it keeps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    SEGMENTS,
    B,
    S,
    T,
    operands,
    stack,
    temporary_bytes,
    value_and_grads,
)

from research.kernels.attend import reference
from research.kernels.blockwise import blockwise, default_tiles
from research.kernels.mask import Mask
from research.kernels.tiles import Tiles


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_reference(key, name):
    mask, N, K = CASES[name]
    args = (*operands(key, N, K), mask)
    wanted = value_and_grads(reference, *args)
    for ours, theirs in zip(
        value_and_grads(partial(blockwise, tiles=Tiles(8, 16)), *args), wanted, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("tiles", [Tiles(64, 64), Tiles(37, 8), Tiles(5, 45), None])
def test_every_tile_size_gives_the_same(key, tiles):
    mask = Mask(offset=S - T, **SEGMENTS)
    args = (*operands(key, 4, 2), mask)
    wanted = value_and_grads(reference, *args)
    for ours, theirs in zip(
        value_and_grads(partial(blockwise, tiles=tiles), *args), wanted, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rows_that_see_nothing_are_zero_and_keys_nobody_sees_have_no_gradient(key):
    ids = jnp.ones((B, T), int).at[0, :20].set(0).at[1].set(0)
    mask = Mask(query_segments=ids, key_segments=ids)
    args = (*operands(key, 2, 1, S=T), mask)
    results = value_and_grads(partial(blockwise, tiles=Tiles(8, 8)), *args)
    for x in results:
        assert np.all(np.isfinite(x)) and np.any(x[0, 20:])
        assert not np.any(x[0, :20]) and not np.any(x[1])


def test_large_scores_do_not_overflow(key):
    q, k, v, weights = operands(key, 2, 2)
    args = (q * 1e3, k, v, weights, Mask())
    for ours, theirs in zip(
        value_and_grads(partial(blockwise, tiles=Tiles(8, 8)), *args),
        value_and_grads(reference, *args),
        strict=True,
    ):
        assert np.all(np.isfinite(ours))
        # A score of thousands is a multiple of 1e-4 in float32, and so are the powers' errors.
        np.testing.assert_allclose(ours, theirs, atol=3e-4 * max(1, np.abs(theirs).max()))


def test_bfloat16_is_no_worse_than_the_reference_in_bfloat16(key):
    exact_inputs = operands(key, 4, 2, dtype=jnp.bfloat16)
    q, k, v, weights = (x.astype(jnp.float32) for x in exact_inputs)
    oracle = value_and_grads(reference, q, k, v, weights, Mask())
    args = (*exact_inputs[:3], weights, Mask())
    ours = value_and_grads(partial(blockwise, tiles=Tiles(8, 16)), *args)
    theirs = value_and_grads(reference, *args)
    for x, y, true in zip(ours, theirs, oracle, strict=True):
        assert x.dtype == jnp.bfloat16
        error, allowed = (np.abs(np.asarray(z, np.float32) - true).max() for z in (x, y))
        assert error <= 1.5 * allowed + 1e-3


def test_cached_decoding_by_chunks_equals_the_whole(key):
    q, k, v, _ = operands(key, 4, 2, T=32, S=32)
    whole = reference(q, k, v, Mask(window=11))
    step = jax.jit(
        lambda q, offset: blockwise(q, k, v, Mask(window=11, offset=offset), tiles=Tiles(4, 8))
    )
    chunks = [step(q[:, i : i + 8], jnp.int32(i)) for i in range(0, 32, 8)]
    np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), whole, atol=2e-6)


def test_keys_beyond_the_diagonal_are_never_read(key):
    # The last two key blocks hold nan: only skipping them leaves the result clean.
    q, k, v, _ = operands(key, 2, 2, T=16, S=32)
    wanted = reference(q, k, v, Mask())
    k, v = k.at[:, 16:].set(jnp.nan), v.at[:, 16:].set(jnp.nan)
    np.testing.assert_allclose(blockwise(q, k, v, Mask(), tiles=Tiles(8, 8)), wanted, atol=2e-6)


def test_inside_scan_and_checkpoint(key):
    q, k, v, _ = operands(key, 2, 2)
    tiled = partial(blockwise, tiles=Tiles(16, 16))
    ours = jax.jit(jax.grad(partial(stack, tiled, policy=None), (0, 1, 2)))(q, k, v)
    theirs = jax.jit(jax.grad(partial(stack, reference, policy=None), (0, 1, 2)))(q, k, v)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()))


def test_saving_what_is_named_attention_spares_the_second_forward_pass(key):
    q, k, v, _ = operands(key, 2, 2)

    def exponentials(policy):
        loss = partial(stack, partial(blockwise, tiles=Tiles(16, 16)), policy=policy)
        return jax.jit(jax.grad(loss)).lower(q, k, v).as_text().count("stablehlo.exponential")

    # A forward pass has two in each of its two loops, the backward pass one in each.
    names = jax.checkpoint_policies.save_only_these_names("attention")
    assert (exponentials(None), exponentials(names)) == (4 + 4 + 2, 4 + 2)


def test_sharded_batch_and_heads_give_the_same(key):
    args = (*operands(key, 4, 2, B=4), Mask())
    wanted = value_and_grads(reference, *args)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=auto)
    sharding = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    args = (*(jax.device_put(x, sharding) for x in args[:-1]), Mask())
    for ours, theirs in zip(
        value_and_grads(partial(blockwise, tiles=Tiles(16, 16)), *args), wanted, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_temporary_memory_grows_with_the_length_and_not_with_its_square():
    short, long = (temporary_bytes(blockwise, length) for length in (1024, 2048))
    assert long < 2.2 * short
    dense_short, dense_long = (temporary_bytes(reference, length) for length in (1024, 2048))
    assert dense_long > 3.5 * dense_short
    assert long < dense_long / 8


@pytest.mark.parametrize("length", [1, 64, 257, 700, 1024, 5000])
@pytest.mark.parametrize("G", [1, 3, 32])
def test_default_tiles_pad_little_and_stay_small(length, G):
    tiles = default_tiles(length, length, G)
    rows, columns = tiles.counts(length, length)
    most = 1024 if G == 1 and length >= 2048 else 512
    assert max(tiles.key, tiles.query) <= most and G * tiles.query <= max(1536, 64 * G)
    assert rows * tiles.query - length < rows and columns * tiles.key - length < columns


def test_shapes_that_do_not_fit():
    q, k = jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        blockwise(q, k, k, Mask())
