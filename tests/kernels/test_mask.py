"""The dense picture of a mask against a predicate written with Python's own if."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.mask import Mask, to_dense

T, S, B = 5, 9, 2
QUERY_IDS = np.array([[1, 1, 2, 2, 0], [0, 3, 3, 3, 4]])
KEY_IDS = np.array([[0, 1, 1, 1, 1, 2, 2, 2, 0], [0, 0, 3, 3, 3, 3, 3, 4, 4]])


def visible(b, i, j, *, causal, window, offset, prefix, segments):
    position = offset + i
    seen = True
    if causal and j > position:
        seen = False
    if window is not None and position - j >= window:
        seen = False
    if window is not None and not causal and j - position >= window:
        seen = False
    if prefix is not None and j < prefix[b]:
        seen = True
    if segments and (QUERY_IDS[b, i] == 0 or QUERY_IDS[b, i] != KEY_IDS[b, j]):
        seen = False
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("prefix", [None, (0, 6)])
@pytest.mark.parametrize("segments", [False, True])
def test_dense_mask_equals_predicate(causal, window, offset, prefix, segments):
    mask = Mask(
        causal=causal,
        window=window,
        offset=offset,
        prefix=None if prefix is None else jnp.array(prefix),
        query_segments=jnp.array(QUERY_IDS) if segments else None,
        key_segments=jnp.array(KEY_IDS) if segments else None,
    )
    parts = {"causal": causal, "window": window, "offset": offset, "prefix": prefix}
    wanted = np.array(
        [
            [[visible(b, i, j, **parts, segments=segments) for j in range(S)] for i in range(T)]
            for b in range(B)
        ]
    )
    dense = np.asarray(to_dense(mask, T, S))
    assert dense.shape[1:] == (1, T, S)
    np.testing.assert_array_equal(np.broadcast_to(dense[:, 0], (B, T, S)), wanted)
