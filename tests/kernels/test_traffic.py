"""FLOPs and bytes counted from the kernels' programs, against counts by hand and FlashAttention's theorem."""

import pytest

from research.kernels.flash1 import flash1
from research.kernels.flash2 import flash2
from research.kernels.flash_tiles import FlashTiles
from research.kernels.mask import Mask
from research.kernels.traffic import Shape, count, plain
from research.kernels.triton import Tile

SMALL = FlashTiles(Tile(32, 16), Tile(32, 32), Tile(32, 32))


def tiled(query, key):
    return FlashTiles(*(Tile(query, key) for _ in range(3)))


def test_the_forward_pass_by_hand():
    """T 64, tiles 32x16: the first query block sees 2 key blocks, the second 4; 2 heads, 3 rows."""
    shape, tiles, programs = Shape(3, 64, 64, 2, 1, 16), 6, 12
    cost = count(flash2, shape, Mask(), SMALL)["flash2_forward"]
    assert cost.flops == 6 * tiles * 2 * (2 * 32 * 16 * 16)
    keys = 6 * tiles * 2 * 16 * 16 * 2  # k and v of each tile, 2 bytes
    queries = programs * 32 * (16 * 2 * 2 + 4)  # q in, out and log-sum-exp out
    indices = 6 * tiles * 4 + programs * 2 * 4 + 6 * 3 * 2 * 4  # table: blocks, counts; offsets
    assert cost.moved == pytest.approx(keys + queries + indices, rel=0.01)
    operands = 3 * 64 * 16 * 2 * (2 + 1 + 1 + 2) + 3 * 2 * 64 * 4
    assert cost.arrays == pytest.approx(operands, rel=0.01)


def test_products_of_the_backward_pass():
    """Without a mask: 2 products of T·S·H forward, 3 for dq, 4 for dk and dv; 5 in one pass."""
    shape = Shape(2, 128, 96, 4, 2, 32)
    product = 2 * 2 * 4 * 128 * 96 * 32
    two = {k: c.flops / product for k, c in count(flash2, shape, Mask(causal=False), SMALL).items()}
    assert two == {"flash2_forward": 2, "flash2_queries": 3, "flash2_keys": 4}
    one = {k: c.flops / product for k, c in count(flash1, shape, Mask(causal=False), SMALL).items()}
    assert one == {"flash1_forward": 2, "flash1_backward": 5}
    assert plain(shape).flops == 6 * product


def test_larger_query_tiles_read_keys_less_often():
    """Theorem 2: T²H²/M numbers, so that twice the tile halves what is moved, up to q and out."""
    shape = Shape(1, 4096, 4096, 1, 1, 64)
    moved = {
        tile: count(flash2, shape, Mask(causal=False), tiled(tile, 64))["flash2_forward"].moved
        for tile in (32, 64, 128)
    }
    own = 4096 * (64 * 2 * 2 + 4)
    for tile in (32, 64):
        assert (moved[tile] - own) / (moved[2 * tile] - own) == pytest.approx(2, rel=0.02)


def test_flash_moves_less_than_the_plain_form_and_flash2_less_than_flash1():
    shape = Shape(8, 2048, 2048, 12, 12, 64)
    moved = {
        kernel.__name__: sum(c.moved for c in count(kernel, shape, Mask(), tiled(64, 64)).values())
        for kernel in (flash1, flash2)
    }
    assert moved["flash2"] < 0.6 * moved["flash1"] < 0.6 * plain(shape).moved
    arrays = sum(c.arrays for c in count(flash2, shape, Mask(), tiled(64, 64)).values())
    assert arrays < 0.06 * plain(shape).arrays


def test_a_window_makes_the_cost_linear():
    def flops(T):
        return count(flash2, Shape(1, T, T, 1, 1, 64), Mask(window=256), tiled(64, 64))[
            "flash2_forward"
        ].flops

    assert flops(8192) / flops(4096) == pytest.approx(2, rel=0.05)
