"""The table of tiles against the dense mask, tile by tile."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.mask import Mask, to_dense
from research.kernels.tiles import (
    EMPTY,
    FULL,
    PARTIAL,
    Tiles,
    tile_states,
    visit_table,
    visits,
    walk,
)


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


@pytest.mark.parametrize(("T", "S", "tiles"), SHAPES)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_pair_is_visited_once_and_no_empty_tile(T, S, tiles, axis, parts):
    """What a kernel does: walk over the rows of the table and look at each tile's pairs."""
    for causal, window, offset in itertools.product((True, False), (None, 4), {0, S - T}):
        mask = Mask(causal=causal, window=window, offset=offset)
        dense = np.asarray(to_dense(mask, T, S))[0, 0]
        table = np.asarray(visit_table(mask, T, S, tiles, axis))[0]
        counted = np.zeros_like(dense, int)
        for block, part in itertools.product(range(len(table)), range(parts)):
            for kind, other in walked(table, block, part, parts):
                i, j = (block, other) if axis == 2 else (other, block)
                place = np.s_[
                    i * tiles.query : (i + 1) * tiles.query, j * tiles.key : (j + 1) * tiles.key
                ]
                assert dense[place].any() and (kind == 1 or dense[place].all())
                counted[place] += dense[place]
        np.testing.assert_array_equal(counted, dense)


def walked(table, block, part, parts):
    """[(0 full or 1 partial, other block)] in the order of `walk`."""
    with jax.disable_jit():
        step = lambda other, found, masked: [*found, (int(masked), int(other))]  # noqa: E731
        return walk(step, table, [], block, share=(part, parts))
