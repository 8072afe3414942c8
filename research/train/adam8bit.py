"""Adam whose moments have 8 bits. Dettmers et al. 2021 (arXiv:2110.02861).

A leaf is flattened and cut into blocks of 256. Each moment is kept as one code a number and a float32
for each block, its largest magnitude: 2 + 2 * 4 / 256 bytes a parameter instead of 8. A step decodes
both, moves them by the gradient, takes the direction from the moments before they are rounded again,
and encodes them.

Differs from the paper: no stable embedding layer. Differs from bitsandbytes' AdamW8bit:
1. A stacked leaf [L, in, out] is one leaf, so that blocks and `min_size` count all of its layers, and
   its matrices are [in, out] where torch's are [out, in]: blocks hold other numbers.
2. Codes are the nearest entries of the table. Its CPU kernel rounds to steps of 3e-5 of a block's
   largest number first (`codes.steps`), which makes small second moments larger and zero first moments
   a little more than zero; its GPU kernel also keeps the sign of a first moment that rounds to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.codes import blocks
from research.codes.tables import nearest
from research.types import Array, Params, PyTree

BLOCK = 256
FIRST, SECOND = "DYNAMIC", "DYNAMIC_UNSIGNED"


class Adam8bitState(NamedTuple):
    """count int32 []; mu, nu: uint8 codes in the shape of each leaf, or float32 moments of a small one;
    mu_absmax, nu_absmax: float32 [blocks], or [0].

    On a mesh codes are split as their parameters are (`sharding.follow`) and absmax is replicated:
    blocks run across the pieces, and XLA gathers what a block needs.
    """

    count: Array
    mu: Params
    nu: Params
    mu_absmax: Params
    nu_absmax: Params


class _Moved(NamedTuple):
    direction: Array
    mu: Array
    nu: Array
    mu_absmax: Array
    nu_absmax: Array


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    min_size: int = 4096,
    find: Callable[[Array, str], Array] = nearest,
) -> optax.GradientTransformation:
    """Gradient -> m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps). Leaves of fewer than `min_size`
    numbers keep float32 moments; `find` gives the code of a number (`blocks.encode`)."""

    def init(params: Params) -> Adam8bitState:
        def moment(leaf: Array) -> Array:
            return jnp.zeros(leaf.shape, jnp.uint8 if leaf.size >= min_size else jnp.float32)

        def absmax(leaf: Array) -> Array:
            return jnp.zeros(-(-leaf.size // BLOCK) if leaf.size >= min_size else 0, jnp.float32)

        zeros = (jax.tree.map(of, params) for of in (moment, moment, absmax, absmax))
        return Adam8bitState(jnp.zeros([], jnp.int32), *zeros)

    def update(updates: PyTree, state: Adam8bitState, params: Params | None = None):
        count = optax.safe_increment(state.count)

        def move(g, mu, nu, mu_absmax, nu_absmax) -> _Moved:
            m = b1 * _decoded(mu, mu_absmax, FIRST) + (1 - b1) * g
            v = b2 * _decoded(nu, nu_absmax, SECOND) + (1 - b2) * jnp.square(g)
            root = jnp.sqrt(v / (1 - b2**count)) + eps
            mu, mu_absmax = _encoded(m, mu, mu_absmax, FIRST, find)
            nu, nu_absmax = _encoded(v, nu, nu_absmax, SECOND, find)
            return _Moved(m / (1 - b1**count) / root, mu, nu, mu_absmax, nu_absmax)

        moved = jax.tree.map(move, updates, *state[1:])
        direction, *moments = (
            jax.tree.map(lambda leaf, at=at: leaf[at], moved, is_leaf=_is_moved)
            for at in range(len(_Moved._fields))
        )
        return direction, Adam8bitState(count, *moments)

    return optax.GradientTransformation(init, update)


def _is_moved(node: PyTree) -> bool:
    return isinstance(node, _Moved)


def _decoded(moment: Array, absmax: Array, table: str) -> Array:
    if moment.dtype != jnp.uint8:
        return moment
    return blocks.decode(moment.reshape(-1), absmax, table, BLOCK).reshape(moment.shape)


def _encoded(
    moment: Array,
    before: Array,
    absmax: Array,
    table: str,
    find: Callable[[Array, str], Array],
) -> tuple[Array, Array]:
    """`moment` as it is kept: as `before` and its `absmax` are."""
    if before.dtype != jnp.uint8:
        return moment, absmax
    codes, absmax = blocks.encode(moment.reshape(-1), table, BLOCK, find)
    if table == SECOND:  # code 0 is 0: the next small gradient would be divided by eps alone
        codes = jnp.where((moment.reshape(-1) > 0) & (codes == 0), 1, codes).astype(codes.dtype)
    return codes.reshape(moment.shape), absmax
