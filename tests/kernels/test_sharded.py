"""A kernel on a mesh of eight devices is the kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.blockwise import blockwise
from research.kernels.mask import Mask
from research.kernels.sharded import over_mesh
from research.kernels.tiles import Tiles
from research.train.sharding import make_mesh

B, T, N, K, H = 4, 24, 4, 2, 8


def operands(key):
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    keys = jax.random.split(key, 4)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("offset", [0, 3])
def test_values_and_gradients_with_every_part_of_a_mask(key, offset):
    q, k, v, weights = operands(key)
    ids = jnp.array(np.sort(np.random.default_rng(0).integers(0, 3, (B, T)), axis=1))
    mask = Mask(
        window=9,
        offset=offset,
        prefix=jnp.arange(B),
        query_segments=ids,
        key_segments=ids,
        slopes=2.0 ** -jnp.arange(1, N + 1),
    )
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def run(attend):
        def loss(q, k, v):
            out = attend(q, k, v, mask, 0.4, softcap=2.0)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    ours = run(over_mesh(partial(blockwise, tiles=Tiles(8, 8)), mesh))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(run(reference)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_each_device_drops_other_probabilities(key):
    q, k, _, _ = operands(key)
    one = jnp.broadcast_to(jnp.eye(T, H)[None, :, None], (B, T, K, H))
    attend = over_mesh(blockwise, make_mesh(data=4, tensor=2))
    out = jax.jit(partial(attend, mask=Mask(), dropout=(0.5, key)))(q * 0, k * 0, one)
    dropped = np.asarray(out == 0)
    assert not np.array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[:, :, 0], dropped[:, :, 2])


def test_what_does_not_divide_is_refused(key):
    q, k, v, _ = operands(key)
    with pytest.raises(ValueError, match="4 rows cannot be split over 8 devices"):
        over_mesh(blockwise, make_mesh(data=8))(q, k, v, Mask())
    with pytest.raises(ValueError, match="2 key/value heads cannot be split over 4 devices"):
        over_mesh(blockwise, make_mesh(tensor=4))(q, k, v, Mask())
