"""FlashAttention's Pallas kernels, interpreted, against the T×S reference: values and all gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.blockwise import blockwise
from research.kernels.flash1 import flash1
from research.kernels.flash2 import flash2
from research.kernels.flash_tiles import FlashTiles
from research.kernels.mask import Mask
from research.kernels.tiles import Tiles
from research.kernels.triton import Tile

B = 2
TILES = FlashTiles(Tile(32, 16), Tile(16, 32), Tile(32, 32))
RNG = jax.random.key(7)


def ids(S, count=4):
    return jnp.array(np.sort(np.random.default_rng(0).integers(0, count, (B, S)), axis=1))


def segments(T, S, **more):
    return {"query_segments": ids(S, **more)[:, S - T :], "key_segments": ids(S, **more)}


def slopes(N):
    return 2.0 ** -jnp.arange(1, N + 1)


EACH = jnp.broadcast_to(jnp.arange(1, 65), (B, 64))
# name: (T, S, query heads, key/value heads, H, mask, softcap, rate of dropout)
CASES = {
    "causal": (128, 128, 4, 4, 32, Mask(), None, 0.0),
    "full, padded head": (96, 96, 2, 2, 24, Mask(causal=False), None, 0.0),
    "37 of 37": (37, 37, 2, 1, 16, Mask(), None, 0.0),
    "one of one": (1, 1, 2, 2, 16, Mask(), None, 0.0),
    "bottom right": (75, 250, 2, 1, 16, Mask(offset=175), None, 0.0),
    "eight heads on two": (64, 64, 8, 2, 16, Mask(), None, 0.0),
    "eight heads on one": (64, 64, 8, 1, 16, Mask(), None, 0.0),
    "window in a block": (128, 128, 2, 2, 16, Mask(window=5), None, 0.0),
    "two-sided window": (64, 100, 2, 2, 16, Mask(causal=False, window=40), None, 0.0),
    "alibi": (64, 64, 4, 2, 16, Mask(slopes=slopes(4)), None, 0.0),
    "prefix": (100, 100, 2, 2, 16, Mask(prefix=jnp.array([0, 45])), None, 0.0),
    "a segment a token": (
        64,
        64,
        2,
        2,
        16,
        Mask(query_segments=EACH, key_segments=EACH),
        None,
        0.0,
    ),
    "soft cap": (64, 64, 2, 2, 16, Mask(), 0.7, 0.0),
    "dropout": (64, 64, 2, 2, 16, Mask(causal=False), None, 0.4),
    "traced offset": (64, 100, 2, 2, 16, Mask(offset=jnp.int32(36)), None, 0.0),
    "everything": (
        100,
        150,
        4,
        2,
        32,
        Mask(
            window=60,
            offset=50,
            prefix=jnp.array([0, 29]),
            slopes=slopes(4),
            **segments(100, 150),
        ),
        1.5,
        0.2,
    ),
}


def operands(T, S, N, K, H, dtype=jnp.float32, key=RNG):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    keys = jax.random.split(key, 4)
    return [
        jax.random.normal(x, shape).astype(dtype) for x, shape in zip(keys, shapes, strict=True)
    ]


def value_and_grads(attend, q, k, v, weights, mask, softcap=None, rate=0.0):
    """(out, gradients of a weighted sum in q, k, v and, where there are slopes, in them)."""
    more = {"softcap": softcap, "dropout": (rate, RNG) if rate else None}

    def loss(q, k, v, slopes):
        out = attend(q, k, v, mask.replace(slopes=slopes), **more)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    wanted = (0, 1, 2) if mask.slopes is None else (0, 1, 2, 3)
    grads, out = jax.jit(jax.grad(loss, wanted, has_aux=True))(q, k, v, mask.slopes)
    return out, *grads


def worst(ours, theirs):
    """Largest error of each result over the largest of its true values; nan counts as infinite."""
    for x, y in zip(ours, theirs, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape and np.isfinite(x).all()
        yield np.abs(x - y).max() / max(np.abs(y).max(), 1)


@pytest.mark.parametrize("name", CASES)
def test_flash2_equals_the_reference(name):
    *shape, mask, softcap, rate = CASES[name]
    args = (*operands(*shape), mask, softcap, rate)
    ours = value_and_grads(partial(flash2, tiles=TILES, interpret=True), *args)
    theirs = value_and_grads(reference, *args)
    assert max(worst(ours, theirs)) < 2e-6


@pytest.mark.parametrize("name", ["37 of 37", "dropout", "everything"])
def test_flash1_equals_the_reference(name):
    *shape, mask, softcap, rate = CASES[name]
    args = (*operands(*shape), mask, softcap, rate)
    ours = value_and_grads(partial(flash1, tiles=TILES, interpret=True), *args)
    theirs = value_and_grads(reference, *args)
    assert max(worst(ours, theirs)) < 2e-6


def test_blockwise_has_the_same_soft_cap_and_drops_the_same():
    *shape, mask, softcap, rate = CASES["everything"]
    args = (*operands(*shape), mask, softcap, rate)
    ours = value_and_grads(partial(blockwise, tiles=Tiles(32, 16)), *args)
    assert max(worst(ours, value_and_grads(reference, *args))) < 2e-6


def test_300_queries_at_the_end_of_1000_keys():
    q, k, v, _ = operands(300, 1000, 2, 1, 16)
    mask, tiles = Mask(offset=700), FlashTiles(Tile(64, 128), TILES.queries, TILES.keys)
    ours = flash2(q, k, v, mask, tiles=tiles, interpret=True)
    assert max(worst([ours], [reference(q, k, v, mask)])) < 2e-6


@pytest.mark.parametrize("kernel", [flash1, flash2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_no_worse_than_the_reference_in_16_bits(kernel, dtype):
    *exact, weights = operands(64, 64, 2, 1, 64, dtype)
    weights = weights.astype(jnp.float32)
    oracle = value_and_grads(reference, *(x.astype(jnp.float32) for x in exact), weights, Mask())
    ours = value_and_grads(partial(kernel, tiles=TILES, interpret=True), *exact, weights, Mask())
    theirs = value_and_grads(reference, *exact, weights, Mask())
    assert all(x.dtype == dtype for x in ours)
    for mine, allowed in zip(worst(ours, oracle), worst(theirs, oracle), strict=True):
        assert mine <= 1.5 * allowed


@pytest.mark.parametrize("kernel", [flash1, flash2])
def test_rows_that_see_nothing_are_zero_and_keys_nobody_sees_have_no_gradient(kernel):
    T = 48
    seen = jnp.ones((B, T), int).at[0, :20].set(0).at[1].set(0)
    mask = Mask(query_segments=seen, key_segments=seen)
    args = (*operands(T, T, 2, 1, 16), mask)
    for x in value_and_grads(partial(kernel, tiles=TILES, interpret=True), *args):
        assert np.all(np.isfinite(x)) and np.any(x[0, 20:])
        assert not np.any(x[0, :20]) and not np.any(x[1])


def test_with_dropout_the_mean_is_the_result_without():
    q, k, v, _ = operands(16, 16, 2, 2, 16)
    drop = jax.jit(lambda rng: flash2(q, k, v, Mask(), None, (0.3, rng), interpret=True))
    mean = sum(drop(key) for key in jax.random.split(RNG, 2000)) / 2000
    np.testing.assert_allclose(mean, reference(q, k, v, Mask()), atol=0.12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpret": None}, "'flash2' runs on a GPU, and this is a cpu: choose 'auto'"),
        ({"dropout": (1.0, RNG)}, "dropout rate must be at least 0 and below 1, not 1.0"),
        ({"softcap": 0.0}, "a soft cap must be above 0, not 0.0"),
        (
            {"q": jnp.zeros((B, 8, 2, 512)), "k": jnp.zeros((B, 8, 2, 512))},
            "16 to 256 numbers, not 512",
        ),
        ({"q": jnp.zeros((B, 8, 2, 16), jnp.int8)}, "one dtype out of bfloat16.*int8, float32"),
        ({"k": jnp.zeros((B, 9, 2, 8))}, r"k and v must be \[2, S, K, 16\]"),
    ],
)
def test_bad_input(change, message):
    q, k = jnp.zeros((B, 8, 2, 16)), jnp.zeros((B, 8, 2, 16))
    given = {"q": q, "k": k, "interpret": True, **change}
    given.setdefault("v", given["k"])
    with pytest.raises(ValueError, match=message):
        flash2(mask=Mask(), **given)


def test_tiles_that_no_kernel_could_have():
    with pytest.raises(ValueError, match="query of a tile must be a power of 2, not 48"):
        Tile(48, 64)
    with pytest.raises(ValueError, match="tensor cores need tiles of 16 at least, not 8x64"):
        Tile(8, 64)
