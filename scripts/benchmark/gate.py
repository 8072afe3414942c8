"""Whether an attention kernel is right on this device, before anybody asks how fast it is.

    gate     bfloat16: errors of values and gradients at most 1.5 times those of the reference in bfloat16
             of their mean square; a kernel of ours gives the same bits a second time, so that nothing
             depends on the order of programs
    exact    float32, of a GPU's own kernels: errors at most 1e-5 of the largest number

A kernel that takes every feature of the contract is given all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.kernels.attend import Attend, reference
from research.kernels.mask import Mask
from research.types import Array

FEATURES = {"flash1", "flash2", "blockwise", "reference"}  # all of the contract
OURS = FEATURES | {"native"}
MOST = 1.5  # times the reference's error
EXACT = 1e-5


def inputs(B: int, T: int, N: int, K: int, H: int, dtype: Any) -> list[Array]:
    """q, k, v and weights of the result."""
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def both(attend: Callable, mask: Mask, *more: Any) -> Callable:
    """(q, k, v, weights) -> (gradients of a weighted sum, out)."""

    def loss(q, k, v, weights):
        out = attend(q, k, v, mask, *more)
        return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def case(name: str, T: int, H: int, dtype: Any) -> tuple[list[Array], Mask, tuple]:
    """What a kernel is called with: (arrays, mask, further arguments)."""
    if name not in FEATURES:
        return inputs(2, T, 4, 4, H, dtype), Mask(), ()
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, T)), axis=1))
    mask = Mask(
        window=T // 2,
        prefix=jnp.array([0, T // 5]),
        query_segments=ids,
        key_segments=ids,
        slopes=2.0 ** -jnp.arange(1, 5),
    )
    return inputs(2, T, 4, 2, H, dtype), mask, (None, (0.1, jax.random.key(1)), 20.0)


def oracle(x: list[Array], mask: Mask, more: tuple) -> Any:
    with jax.default_matmul_precision("highest"):
        return both(reference, mask, *more)(*(y.astype(jnp.float32) for y in x))


def gate(name: str, attend: Attend, T: int, H: int) -> float:
    """Largest error in multiples of the reference's in bfloat16; AssertionError above MOST, or where a
    kernel of ours gives other bits the second time."""
    x, mask, more = case(name, T, H, jnp.bfloat16)
    run = both(attend, mask, *more)
    true, allowed, ours = oracle(x, mask, more), both(reference, mask, *more)(*x), run(*x)
    worst = max(_rms(a, t) / _rms(b, t) for a, b, t in _leaves(ours, allowed, true))
    if not worst <= MOST:
        raise AssertionError(f"{name} is {worst:.2f} times as far from float32 as the reference")
    if name in OURS and not all(jnp.array_equal(a, b) for a, b in _leaves(ours, run(*x))):
        raise AssertionError(f"{name} gives other bits the second time")
    return worst


def exact(name: str, attend: Attend, T: int, H: int) -> float:
    """Largest error in float32, of the largest number; AssertionError above EXACT."""
    x, mask, more = case(name, T, H, jnp.float32)
    true = oracle(x, mask, more)
    with jax.default_matmul_precision("highest"):
        ours = both(attend, mask, *more)(*x)
    worst = max(_error(a, t) / float(jnp.abs(t).max()) for a, t in _leaves(ours, true))
    if not worst <= EXACT:
        raise AssertionError(f"{name} in float32 is wrong by {worst:.2g} of the largest number")
    return worst


def exact_decode(attend: Attend, S: int, H: int) -> float:
    """Largest error in float32 of one query on a cache of S keys, of the largest number."""
    q, k, v = inputs(2, S, 8, 2, H, jnp.float32)[:3]
    q, mask = q[:, -1:], Mask(offset=S - 1)
    with jax.default_matmul_precision("highest"):
        true, ours = (jax.jit(partial(f, mask=mask))(q, k, v) for f in (reference, attend))
    worst = _error(ours, true) / float(jnp.abs(true).max())
    if not worst <= EXACT:
        raise AssertionError(f"decoding is wrong by {worst:.2g} of the largest number")
    return worst


def _leaves(*trees: Any) -> Any:
    return zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)


def _error(x: Array, true: Array) -> float:
    return float(jnp.abs(x.astype(jnp.float32) - true).max()) + 1e-6


def _rms(x: Array, true: Array) -> float:
    return float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - true) ** 2))) + 1e-7
