"""The kernels lowered for CUDA on a machine without one: what is launched, and what is not built."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from research.kernels.flash1 import flash1
from research.kernels.flash2 import flash2
from research.kernels.flash_decode import flash_decode
from research.kernels.flash_tiles import flash_tiles
from research.kernels.mask import Mask
from research.models.decoder import Decoder, init
from research.models.families.llama import llama

T = 512
TILES = flash_tiles(64, jnp.bfloat16, "NVIDIA H100 80GB HBM3")


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def launches(text):
    """[(grid, warps, stages)] of every Triton call, in order."""
    found = []
    for line in text.splitlines():
        if "__gpu$xla.gpu.triton" in line:
            numbers = dict(re.findall(r"(grid_[xyz]|num_\w+) = (\d+)", line))
            grid = tuple(int(numbers[f"grid_{axis}"]) for axis in "xyz")
            found.append((grid, int(numbers["num_warps"]), int(numbers["num_stages"])))
    return found


def shape(T, heads, H=64):
    return jax.ShapeDtypeStruct((2, T, heads, H), jnp.bfloat16)


def gradient(kernel, mask):
    def loss(q, k, v):
        return kernel(q, k, v, mask, tiles=TILES, interpret=False).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def test_flash2_is_three_launches_and_no_square():
    text = lowered(gradient(flash2, Mask()), shape(T, 8), shape(T, 2), shape(T, 2))
    forward, queries, keys = TILES.forward, TILES.queries, TILES.keys
    assert launches(text) == [
        ((T // forward.query, 8, 2), forward.warps, forward.stages),
        ((T // queries.query, 8, 2), queries.warps, queries.stages),
        ((T // keys.key, 2, 2), keys.warps, keys.stages),
    ]
    assert not re.search(rf"tensor<[0-9x]*{T}x{T}x", text)
    assert "sort" not in text  # a causal mask's table of tiles is a constant


def test_flash1_is_a_program_a_head():
    text = lowered(gradient(flash1, Mask()), shape(T, 8), shape(T, 2), shape(T, 2))
    assert [grid for grid, *_ in launches(text)] == [(8, 2, 1), (2, 2, 1)]
    assert not re.search(rf"tensor<[0-9x]*{T}x{T}x", text)


@pytest.mark.parametrize("kernel", [flash1, flash2])
def test_every_feature_lowers(kernel):
    """Odd lengths and heads, and every part of a mask, with a traced offset."""
    B, T, S, N, K, H = 2, 37, 101, 12, 3, 80
    ids = jax.ShapeDtypeStruct((B, S), jnp.int32)
    small = jax.ShapeDtypeStruct((N,), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct((B, t, n, H), jnp.bfloat16) for t, n in ((T, N), (S, K), (S, K))]

    def loss(q, k, v, slopes, prefix, ids, offset, rng):
        mask = Mask(True, 40, offset, prefix, ids[:, S - T :], ids, slopes)
        out = kernel(q, k, v, mask, None, (0.1, rng), 30.0, interpret=False)
        return out.astype(jnp.float32).sum()

    rest = (*small, ids, jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.key, 0))
    text = lowered(jax.grad(loss, (0, 1, 2, 3)), *arrays, *rest)
    assert len(launches(text)) == (2 if kernel is flash1 else 3)


def test_decoding_splits_the_cache():
    decode = partial(flash_decode, interpret=False, parts=7)
    args = shape(1, 8), shape(2048, 2), shape(2048, 2), jnp.int32(700)
    text = lowered(lambda q, k, v, offset: decode(q, k, v, Mask(offset=offset)), *args)
    assert [grid for grid, *_ in launches(text)] == [(7, 2, 2)]


@pytest.mark.parametrize(("remat", "calls"), [(None, 3), ("full", 4)])
def test_a_training_step_of_a_scanned_model(remat, calls):
    """Three launches for all layers of the scan; a fourth where a layer is computed again."""
    attend = partial(flash2, interpret=False)
    config = llama(100, 4, 256, 4, 2, 640, remat=remat, attend=attend, dtype=jnp.bfloat16)
    model = Decoder(config)
    params = jax.eval_shape(partial(init, model), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)

    def loss(params, tokens):
        return model.apply({"params": params}, tokens).sum()

    text = lowered(jax.grad(loss), params, tokens)
    assert len(launches(text)) == calls
    assert not re.search(rf"tensor<[0-9x]*{T}x{T}x", text)
