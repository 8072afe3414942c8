"""Exact attention for a CPU in C++: FlashAttention-2 (Dao 2023, arXiv:2307.08691), `native.cc`.

The mathematics and the tiles of `blockwise`, which is to be read first; what is gained is that a tile of scores
stays in the first-level cache from one product to the next, which XLA's loops cannot be told to do
(docs/FLASH_ATTENTION.md has the times of both). JAX cuts arrays into blocks, says which tiles to visit
and sums over what shares a head; C++ works on tiles. Memory grows with T + S.

It needs a C++ compiler, which is asked for once (`build`). No ALiBi, soft cap or dropout, no second
derivative, and XLA's own counts of FLOPs do not see it.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.kernels.attend import check_inputs
from research.kernels.build import BuildError, library
from research.kernels.mask import Mask
from research.kernels.online import LOG2E
from research.kernels.tiles import Tiles, allowed_gaps, from_groups, tile_states, to_groups
from research.types import Array

BLOCK = 64  # as in native.cc: a tile of scores is 16 kB
MULTIPLE = 16  # what the lengths of blocks and heads are padded to: the widest vector of a CPU
# The backward pass has at least so many pieces, however few heads there are. Not the number of
# threads: the order of sums, and so every bit of a gradient, would depend on the machine.
PIECES = 8

log = logging.getLogger(__name__)


def native(q: Array, k: Array, v: Array, mask: Mask, scale: float | None = None) -> Array:
    """The contract of `research.kernels.attend`; all inside is float32.

    Gradients flow to q, k and v, in reverse mode only. Batch and heads are the loop of one call, so shard them
    with `shard_map`, not by annotation alone. Under `jax.checkpoint` the names "attention" mark what
    the backward pass needs.
    """
    check_inputs(q, k, v, mask)
    reason = _unable(mask) or unavailable()
    if reason:
        raise ValueError(f"the kernel 'native' {reason}: choose 'auto', 'blockwise' or 'reference'")
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _attention(q, k, v, mask, scale, Tiles(_even(q.shape[1]), _even(k.shape[1])))


def _unable(mask: Mask) -> str | None:
    """Why the call cannot be made on any machine like this, or None."""
    if jax.default_backend() != "cpu":
        return f"runs on a CPU, and this is a {jax.default_backend()}"
    return None if mask.slopes is None else "has no slopes in its mask"


@cache
def unavailable() -> str | None:
    """Why this machine's CPU cannot run the kernel, or None. Compiles it where that was never done."""
    try:
        made = library(Path(__file__).with_suffix(".cc"))
    except BuildError as error:
        log.warning("attention in C++ is not to be had, 'blockwise' takes its place: %s", error)
        return f"could not be compiled ({error})"
    for name in ("native_forward", "native_backward"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(made, name)), platform="cpu")
    return None


def _even(length: int) -> int:
    """The block size that cuts `length` into the fewest blocks, evenly, in whole vectors."""
    blocks = -(-length // BLOCK)
    return -(-length // (blocks * MULTIPLE)) * MULTIPLE


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, mask, scale, tiles):
    return _forward(q, k, v, mask, scale, tiles)[0]


def _attention_forward(q, k, v, mask, scale, tiles):
    out, lse = _forward(q, k, v, mask, scale, tiles)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, mask, out, lse)


def _attention_backward(scale, tiles, saved, out_grad):
    return *_backward(*saved, out_grad, scale, tiles), None


_attention.defvjp(_attention_forward, _attention_backward)


def _blocks(x: Array, block: int, scale: float = 1.0) -> Array:
    """[B, T, heads, H] -> [B * heads, blocks, block, H] float32, H and T padded with zeros."""
    x = jnp.pad(x.astype(jnp.float32) * scale, ((0, 0),) * 3 + ((0, -x.shape[-1] % MULTIPLE),))
    return to_groups(x, x.shape[2], block)


def _whole(blocks: Array, like: Array, block: int) -> Array:
    """The inverse of `_blocks`: the shape and dtype of `like`."""
    B, T, _, H = like.shape
    return from_groups(blocks, B, T, block)[..., :H].astype(like.dtype)


def _mask_operands(mask: Mask, B: int, T: int, S: int, tiles: Tiles) -> tuple[Array, ...]:
    """What native.cc's `Masking` takes. Where there are no segments all is segment 1; padding is 0."""

    def segments(ids: Array | None, length: int, block: int) -> Array:
        ids = jnp.ones((B, length), jnp.int32) if ids is None else ids.astype(jnp.int32)
        return jnp.pad(ids, ((0, 0), (0, -length % block)))

    prefix = jnp.zeros(B, jnp.int32) if mask.prefix is None else mask.prefix.astype(jnp.int32)
    return (
        tile_states(mask, T, S, tiles).astype(jnp.int32),
        jnp.asarray(mask.offset, jnp.int32),
        prefix,
        segments(mask.query_segments, T, tiles.query),
        segments(mask.key_segments, S, tiles.key),
    )


def _call(name: str, mask: Mask, *results: tuple[int, ...]):
    shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results)
    low, high = allowed_gaps(mask)
    call = jax.ffi.ffi_call(name, shapes, vmap_method="sequential")
    return partial(call, low=int(low), high=int(high))


def _forward(q, k, v, mask, scale, tiles):
    """out [B, T, N, H] and the log-sum-exp of every row, [B * N, query blocks, block]."""
    (B, T), S = q.shape[:2], k.shape[1]
    queries = _blocks(q, tiles.query, scale * LOG2E)
    keys, values = _blocks(k, tiles.key), _blocks(v, tiles.key)
    call = _call("native_forward", mask, queries.shape, queries.shape[:3])
    out, lse = call(queries.mT, keys, values, *_mask_operands(mask, B, T, S, tiles))
    return _whole(out, q, tiles.query), lse


def _backward(q, k, v, mask, out, lse, out_grad, scale, tiles):
    """Gradients of q, k and v."""
    (B, T, N), (S, K) = q.shape[:3], k.shape[1:3]
    # dS = P * (dP - delta): delta is the product of a row's result with its gradient.
    delta = jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), -1, keepdims=True)
    queries, grads = _blocks(q, tiles.query, scale * LOG2E), _blocks(out_grad, tiles.query)
    keys, values = _blocks(k, tiles.key), _blocks(v, tiles.key)
    of_heads = (B * N, *keys.shape[1:])
    parts = min(-(-PIECES // (B * N)), keys.shape[1])
    q_grad, k_grad, v_grad = _call(
        "native_backward", mask, (parts, *queries.shape), of_heads, of_heads
    )(
        queries,
        queries.mT,
        keys,
        values,
        grads,
        grads.mT,
        lse,
        to_groups(delta, N, tiles.query)[..., 0],
        *_mask_operands(mask, B, T, S, tiles),
    )
    # The queries were scaled by scale * log2(e), and scores are in base 2.
    k_grad, v_grad = (x.reshape(B * K, N // K, *keys.shape[1:]).sum(1) for x in (k_grad, v_grad))
    return (
        _whole(q_grad.sum(0) * scale, q, tiles.query),
        _whole(k_grad / LOG2E, k, tiles.key),
        _whole(v_grad, v, tiles.key),
    )
