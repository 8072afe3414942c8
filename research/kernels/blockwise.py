"""Exact attention in tiles for the CPU: FlashAttention-2 (Dao 2023, arXiv:2307.08691) in plain JAX.

The T×S scores are never built: memory grows with T + S. The vjp is written out, and keeps only the
result and the log-sum-exp of each row; the backward pass rebuilds the probabilities tile by tile.

One key/value head is worked on at a time, so that its tiles stay in the cache of the processor.
The G query heads that share it are stacked as rows of one tile, which makes the matmuls larger and
sums dk and dv over the group without a copy of k or v per query head. The backward pass works on
transposed tiles, Sᵀ = K·Qᵀ, where dk and dv are plain products. Everything inside is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from research.kernels.attend import check_inputs
from research.kernels.dropout import kept
from research.kernels.mask import Mask
from research.kernels.online import (
    Score,
    absorb,
    begin,
    bent,
    dot,
    finish,
    masked_scores,
    scoring,
    tile_grads,
    unbent_grad,
)
from research.kernels.tiles import Tiles, from_groups, to_groups, visit_table, walk
from research.types import Array


def blockwise(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float | None = None,
    dropout: tuple[float, Array] | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> Array:
    """The contract of `research.kernels.attend`; `tiles` is chosen by shape when None.

    `scale` is a Python number. Gradients flow to q, k, v and mask.slopes, in reverse mode only.
    Batch and head axes become one loop, so shard them with `shard_map`, not by annotation alone.
    Under `jax.checkpoint` the names "attention" mark what the backward pass needs.
    """
    check_inputs(q, k, v, mask)
    T, N, H = q.shape[1:]
    S, K = k.shape[1:3]
    score, seed = scoring(H, scale, softcap, dropout)
    tiles = default_tiles(T, S, N // K) if tiles is None else tiles
    return _attention(q, k, v, mask.slopes, mask.replace(slopes=None), seed, score, tiles)


def default_tiles(T: int, S: int, G: int) -> Tiles:
    """Blocks of nearly equal size: at most 512 keys, 512 query positions and 1536 query rows; where queries
    are alone with their keys and many, twice as long either way. Measured: docs/PERFORMANCE.md."""
    if G == 1 and T >= 2048:
        return Tiles(_even(T, 1024), _even(S, 1024))
    return Tiles(_even(T, max(64, min(512, 1536 // G))), _even(S, 512))


def _even(length: int, most: int) -> int:
    """The block size that cuts `length` into the fewest blocks of at most `most`, evenly."""
    blocks = -(-length // most)
    return -(-length // blocks)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, slopes, mask, seed, score, tiles):
    return _forward(q, k, v, slopes, mask, seed, score, tiles)[0]


def _attention_forward(q, k, v, slopes, mask, seed, score, tiles):
    out, lse = _forward(q, k, v, slopes, mask, seed, score, tiles)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, slopes, mask, seed, out, lse)


def _attention_backward(score, tiles, saved, out_grad):
    return *_backward(*saved, out_grad, score, tiles), None, None


_attention.defvjp(_attention_forward, _attention_backward)


# Below the loop over groups (`tiles.to_groups`) everything is float32.


def _group_context(mask: Mask, slopes: Array | None, B: int, K: int, G: int, tiles: Tiles) -> tuple:
    """(mask, heads [B*K, G]): a leading group axis on every array, segments cut into blocks; heads
    are counted over the whole batch."""

    def blocks(ids: Array, block: int) -> Array:
        return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block))).reshape(B, -1, block)

    repeat = partial(jnp.repeat, repeats=K, axis=0)
    grouped = mask.replace(offset=jnp.full(B * K, mask.offset, jnp.int32))
    if mask.prefix is not None:
        grouped = grouped.replace(prefix=repeat(mask.prefix))
    if mask.query_segments is not None:
        grouped = grouped.replace(
            query_segments=repeat(blocks(mask.query_segments, tiles.query)),
            key_segments=repeat(blocks(mask.key_segments, tiles.key)),
        )
    if slopes is not None:
        grouped = grouped.replace(slopes=jnp.tile(slopes.reshape(K, -1), (B, 1)))
    return grouped, jnp.arange(B * K * G).reshape(B * K, G)


def _group_visits(mask: Mask, B: int, K: int, T: int, S: int, tiles: Tiles, axis: int) -> Array:
    """The table of `visit_table` for each group."""
    table = visit_table(mask, T, S, tiles, axis)
    return jnp.repeat(jnp.broadcast_to(table, (B, *table.shape[1:])), K, axis=0)


def _walk(step: Callable, seen: Array, carry: Any) -> Any:
    if seen.shape[-1] == 2:  # one tile: a loop of zero or one rounds costs more than a mask
        return step(0, carry, True)
    return walk(step, seen, carry)


def _tile(
    product: Array,
    score: Score,
    context: tuple,
    i: Array,
    j: Array,
    tiles: Tiles,
    S: int,
    masked: bool,
    axis: int,
) -> tuple[Array, Array, Array | None]:
    """(scores, the same before mask and ALiBi, what dropout multiplies) of tile (i, j), from q·k.

    The rows, (query head, position), run along `axis`.
    """
    mask, heads, seed = context
    G = product.shape[axis] // tiles.query
    rows, columns = partial(jnp.expand_dims, axis=1 - axis), partial(jnp.expand_dims, axis=axis)
    query = rows(jnp.tile(i * tiles.query + jnp.arange(tiles.query), G))
    key = columns(j * tiles.key + jnp.arange(tiles.key))
    capped = bent(product, score)
    if mask.slopes is not None:
        mask = mask.replace(slopes=rows(jnp.repeat(mask.slopes, tiles.query)))
    if masked and mask.query_segments is not None:
        mask = mask.replace(
            query_segments=rows(jnp.tile(mask.query_segments[i], G)),
            key_segments=columns(mask.key_segments[j]),
        )
    scores = masked_scores(capped, mask, query, key, S, masked)
    if seed is None:
        return scores, capped, None
    return scores, capped, kept(seed, rows(jnp.repeat(heads, tiles.query)), query, key, score.rate)


def _forward(q, k, v, slopes, mask, seed, score, tiles):
    """out [B, T, N, H] and the log-sum-exp of every row, [B*K, query blocks, G * block]."""
    B, T, N = q.shape[:3]
    S, K = k.shape[1:3]
    operands = (
        to_groups(q, K, tiles.query),
        to_groups(k, K, tiles.key),
        to_groups(v, K, tiles.key),
        _group_context(mask, slopes, B, K, N // K, tiles),
        _group_visits(mask, B, K, T, S, tiles, axis=2),
    )

    def group(operands):
        q, k, v, context, seen = operands
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        block = partial(_forward_block, q, k, v, (*context, seed), seen, score, tiles, S)
        return lax.map(block, jnp.arange(q.shape[0]))

    out, lse = lax.map(group, operands)
    return from_groups(out.astype(q.dtype), B, T, tiles.query), lse


def _forward_block(q, k, v, context, seen, score, tiles, S, i):
    """One query block against the key blocks it sees: out [rows, H], log-sum-exp [rows]."""
    _, rows, H = q.shape

    def step(j, state, masked):
        product = dot(q[i], k[j].T)
        scores, _, kept = _tile(product, score, context, i, j, tiles, S, masked, axis=0)
        return absorb(state, scores, v[j], kept)

    return finish(_walk(step, seen[i], begin(rows, H)))


def _backward(q, k, v, slopes, mask, seed, out, lse, out_grad, score, tiles):
    """Gradients of q, k, v and slopes (None when there are none)."""
    B, T, N = q.shape[:3]
    S, K = k.shape[1:3]
    # dS = P * (dP - delta): delta is the product of a row's result with its gradient.
    delta = jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), -1, keepdims=True)
    operands = (
        to_groups(q, K, tiles.query),
        to_groups(k, K, tiles.key),
        to_groups(v, K, tiles.key),
        to_groups(out_grad, K, tiles.query),
        to_groups(delta, K, tiles.query)[..., 0],
        lse,
        _group_context(mask, slopes, B, K, N // K, tiles),
        _group_visits(mask, B, K, T, S, tiles, axis=1),
    )
    grads = lax.map(partial(_backward_group, score, seed, tiles, S), operands)
    q_grad, k_grad, v_grad, slopes_grad = grads
    return (
        from_groups(q_grad, B, T, tiles.query).astype(q.dtype),
        from_groups(k_grad, B, S, tiles.key).astype(k.dtype),
        from_groups(v_grad, B, S, tiles.key).astype(v.dtype),
        None if slopes is None else slopes_grad.reshape(B, -1).sum(0).astype(slopes.dtype),
    )


def _backward_group(score, seed, tiles, S, operands):
    """Gradients of one group: a loop over key blocks, and inside over the queries that see each."""
    q, k, v, out_grad, delta, lse, context, seen = operands
    q, k, v, out_grad = (x.astype(jnp.float32) for x in (q, k, v, out_grad))
    G, slopes, context = q.shape[1] // tiles.query, context[0].slopes, (*context, seed)

    def key_block(carry, j):
        def step(i, carry, masked):
            q_grad, k_grad, v_grad, slopes_grad = carry
            product = dot(k[j], q[i].T)
            scores, capped, kept = _tile(product, score, context, i, j, tiles, S, masked, axis=1)
            value_product = dot(v[j], out_grad[i].T)
            weights, grad = tile_grads(scores, lse[i], value_product, delta[i], kept)
            v_grad += dot(weights, out_grad[i])
            if slopes_grad is not None:
                slopes_grad += _slopes_grad(grad, context[0], i, j, tiles, G)
            grad = unbent_grad(grad, capped, score)
            k_grad += dot(grad, q[i])
            return q_grad.at[i].add(dot(k[j].T, grad)), k_grad, v_grad, slopes_grad

        q_grad, slopes_grad = carry
        zeros = jnp.zeros(k.shape[1:])
        start = q_grad, zeros, zeros, slopes_grad
        q_grad, k_grad, v_grad, slopes_grad = _walk(step, seen[j], start)
        return (q_grad, slopes_grad), (k_grad, v_grad)

    # dqᵀ: only the small operand is transposed.
    start = jnp.zeros(q.mT.shape), None if slopes is None else jnp.zeros(G)
    (q_grad, slopes_grad), (k_grad, v_grad) = lax.scan(key_block, start, jnp.arange(k.shape[0]))
    return q_grad.mT * score.scale, k_grad * score.scale, v_grad, slopes_grad


def _slopes_grad(grad: Array, mask: Mask, i: Array, j: Array, tiles: Tiles, G: int) -> Array:
    """Sum of dS times ALiBi's distances per query head: [G]."""
    grad = grad.reshape(tiles.key, G, tiles.query)
    query, key = i * tiles.query + jnp.arange(tiles.query), j * tiles.key + jnp.arange(tiles.key)
    gap = (key[:, None] - query - mask.offset).astype(jnp.float32)
    return jnp.einsum("sgt,st->g", grad, gap)
