"""A kernel on a mesh of eight devices is the kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels import select
from research.kernels.attend import reference
from research.kernels.blockwise import blockwise
from research.kernels.flash2 import flash2
from research.kernels.flash_decode import flash_decode
from research.kernels.flash_tiles import FlashTiles
from research.kernels.mask import Mask
from research.kernels.sharded import over_mesh
from research.kernels.tiles import Tiles
from research.kernels.triton import Tile
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


def test_a_pallas_kernel_and_the_gradient_of_slopes(key):
    q, k, v, weights = operands(key)
    tiles = FlashTiles(*(Tile(16, 16) for _ in range(3)))
    kernel = partial(flash2, tiles=tiles, interpret=True)

    wide = [jnp.tile(x, (1, 1, 1, 2)) for x in (q, k, v, weights)]

    def grads(attend):
        def loss(q, k, v, slopes):
            return (attend(q, k, v, Mask(slopes=slopes)) * wide[3]).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*wide[:3], 2.0 ** -jnp.arange(1, N + 1))

    ours = grads(over_mesh(kernel, make_mesh(data=2, tensor=2)))
    for x, y in zip(ours, grads(reference), strict=True):
        np.testing.assert_allclose(x, y, atol=5e-5)


def test_a_training_step_on_a_mesh_splits_attention(monkeypatch, key):
    """Every device attends to its own rows and heads: seen by the shapes that the kernel is given."""
    seen = []

    name = select.kernel_name(4 * T, 4 * T)
    kernel = select.KERNELS[name]

    def spy(q, k, v, mask, *more, **options):
        seen.append((q.shape, k.shape))
        return kernel(q, k, v, mask, *more, **options)

    monkeypatch.setitem(select.KERNELS, name, spy)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    q, k, v, _ = (jnp.tile(x, (1, 4, 1, 1)) for x in operands(key))
    with jax.set_mesh(mesh):
        out = jax.jit(select.attend_auto)(q, k, v, Mask())
    assert seen == [((1, 4 * T, N // 2, H), (1, 4 * T, K // 2, H))]
    np.testing.assert_allclose(out, reference(q, k, v, Mask()), atol=2e-5)
    with jax.set_mesh(make_mesh(data=8)):
        jax.jit(select.attend_auto)(q[:3], k[:3], v[:3], Mask())
    assert seen[1:] == [((3, 4 * T, N, H), (3, 4 * T, K, H))]  # 3 rows do not split over 8


def test_what_a_kernel_lacks_is_refused_as_without_a_mesh(key):
    q, k, v, _ = operands(key)
    attend = over_mesh(flash_decode, make_mesh(data=2))
    with pytest.raises(ValueError, match="kernel flash_decode has no dropout"):
        attend(q, k, v, Mask(), dropout=(0.1, key))


def test_what_does_not_divide_is_refused(key):
    q, k, v, _ = operands(key)
    with pytest.raises(ValueError, match="4 rows cannot be split over 8 devices"):
        over_mesh(blockwise, make_mesh(data=8))(q, k, v, Mask())
    with pytest.raises(ValueError, match="2 key/value heads cannot be split over 4 devices"):
        over_mesh(blockwise, make_mesh(tensor=4))(q, k, v, Mask())
