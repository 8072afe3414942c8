"""The table of tiles against the dense mask, tile by tile."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.mask import Mask, to_dense
from research.kernels.tiles import EMPTY, FULL, PARTIAL, Tiles, tile_states, visits


def slices(mask, T, S, tiles):
    """(b, query block, key block, that tile of the dense mask cut to real positions)."""
    dense = np.asarray(to_dense(mask, T, S))[:, 0]
    rows, columns = tiles.counts(T, S)
    for b, i, j in itertools.product(range(len(dense)), range(rows), range(columns)):
        row, column = i * tiles.query, j * tiles.key
        yield b, i, j, dense[b, row : row + tiles.query, column : column + tiles.key]


SHAPES = [(1, 1, Tiles(1, 1)), (13, 13, Tiles(4, 3)), (6, 17, Tiles(4, 5)), (16, 16, Tiles(4, 8))]


@pytest.mark.parametrize(("T", "S", "tiles"), SHAPES)
def test_causal_window_and_offset_are_exact(T, S, tiles):
    for causal, window, offset in itertools.product(
        (True, False), (None, 1, 4, 9), {0, 1, S - T, S // 2}
    ):
        mask = Mask(causal=causal, window=window, offset=offset)
        states = np.asarray(tile_states(mask, T, S, tiles))
        for b, i, j, tile in slices(mask, T, S, tiles):
            padded = (j + 1) * tiles.key > S
            full = tile.all() and not padded
            wanted = FULL if full else PARTIAL if tile.any() else EMPTY
            assert states[b, i, j] == wanted, (causal, window, offset, i, j)


def test_a_traced_offset_gives_the_same_table_as_a_static_one():
    tiles = Tiles(4, 4)
    static = tile_states(Mask(offset=7, window=6), 9, 20, tiles)
    np.testing.assert_array_equal(
        static, tile_states(Mask(offset=jnp.int32(7), window=6), 9, 20, tiles)
    )


@pytest.mark.parametrize("seed", range(4))
def test_prefix_and_segments_skip_nothing_visible_and_call_nothing_full_that_is_not(seed):
    random = np.random.default_rng(seed)
    B, T, S, tiles = 3, 18, 23, Tiles(4, 5)
    ids = np.sort(random.integers(0, 4, (B, S)), axis=1)
    ids[0] = random.integers(0, 3, S)  # in no order
    prefix = jnp.array(random.integers(0, S, B))
    for window, prefixed, offset in itertools.product((None, 5), (None, prefix), (0, S - T)):
        mask = Mask(
            window=window,
            offset=offset,
            prefix=prefixed,
            query_segments=jnp.array(ids[:, S - T :]),
            key_segments=jnp.array(ids),
        )
        states = np.asarray(tile_states(mask, T, S, tiles))
        for b, i, j, tile in slices(mask, T, S, tiles):
            if tile.any():
                assert states[b, i, j] != EMPTY
            if not tile.all():
                assert states[b, i, j] != FULL


def test_packed_rows_skip_other_segments():
    ids = jnp.repeat(jnp.arange(1, 5), 8)[None]  # four segments of two blocks each
    mask = Mask(causal=False, query_segments=ids, key_segments=ids)
    states = np.asarray(tile_states(mask, 32, 32, Tiles(4, 4)))[0]
    np.testing.assert_array_equal(
        states, FULL * np.kron(np.eye(4, dtype=int), np.ones((2, 2), int))
    )


def test_visits_list_the_wanted_blocks_in_order():
    order, count = visits(jnp.array([[False, True, False, True], [False] * 4, [True] * 4]))
    assert count.tolist() == [2, 0, 4]
    assert order[0, :2].tolist() == [1, 3]
    assert order[2].tolist() == [0, 1, 2, 3]
