"""FlashAttention as it was first published, as Pallas kernels (Dao et al. 2022, arXiv:2205.14135).

The outer loop is over key blocks, the inner one over the query blocks that see them. Keys and values
are read once, but every inner step reads and writes the queries' result, peak and sum in the GPU's
memory, and divides the result anew. Only one program works on a head, because all key blocks of a
head change the same results: with few heads most of the GPU is idle. FlashAttention-2 (`flash2`) has
the loops the other way round. It is here to be compared with, in numbers and in `traffic`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from research.kernels import operands as given
from research.kernels.flash import attention
from research.kernels.flash_tiles import FlashTiles, flash_tiles
from research.kernels.online import MASKED, Rows, absorb, dot, finish, tile_grads, unbent_grad
from research.kernels.operands import Problem, View
from research.kernels.tiles import walk
from research.kernels.triton import Block, Tile, barrier, divide, launch, piece, program, rows
from research.types import Array


def _forward(q, k, v, mask, seed, call, tiles):
    """out [B, T, N, H] and the log-sum-exp of every row, [B, N, T] float32 in base 2."""
    p = given.problem(q, k, tiles.forward, call)
    (T, S), visits = p.padded, given.table(mask, p, axis=1)
    query = Block((None, T, None, p.H), lambda n, b: (b, 0, n, 0))
    key = Block((None, S, None, p.H), lambda n, b: (b, 0, divide(n, p.group), 0))
    row = ((p.B, p.N, T), jnp.float32, Block((None, None, T), lambda n, b: (b, n, 0)))
    out, peak, total = launch(
        partial(_forward_kernel, p=p),
        "flash1_forward",
        (p.N, p.B),
        (query, key, key, *given.context_blocks(mask, seed, visits, p, whole_table=True)),
        (((p.B, T, p.N, p.H), jnp.float32, query), row, row),
        p.tile,
        call.interpret,
    )(
        given.pad(q, T, p.H),
        given.pad(k, S, p.H),
        given.pad(v, S, p.H),
        *given.context(mask, seed, visits, p),
    )
    lse = jnp.where(peak > MASKED / 2, peak + jnp.log2(total), -MASKED)
    return out[:, : p.T, :, : q.shape[-1]].astype(q.dtype), lse[..., : p.T]


def _forward_kernel(
    q_ref, k_ref, v_ref, mask_ref, seed_ref, visits_ref, out_ref, peak_ref, total_ref, *, p: Problem
):
    n, b = program(0), program(1)
    view, size = View(p, mask_ref, seed_ref, b), p.tile.query
    refs = peak_ref, total_ref, out_ref

    def fill(i: Array, _: Any) -> None:
        put(refs, i, size, (MASKED, 0, 0))

    lax.fori_loop(0, p.blocks[0], fill, None)
    barrier(p.call.interpret)

    def key_block(j: Array, _: Any) -> None:
        k, v = rows(k_ref, j, p.tile.key), rows(v_ref, j, p.tile.key)

        def step(i: Array, _: Any, masked: bool) -> None:
            peak, total, out = (rows(ref, i, size) for ref in refs)
            before = Rows(peak, total, out * total[:, None])
            scores, _ = view.scores(dot(rows(q_ref, i, size), k.T), n, i, j, masked)
            after = absorb(before, scores, v, view.kept(n, i, j))
            barrier(p.call.interpret)  # all have read what is written next
            put(refs, i, size, (after.peak, after.total, finish(after)[0]))
            barrier(p.call.interpret)

        walk(step, visits_ref, None, j)

    lax.fori_loop(0, p.blocks[1], key_block, None)


def put(refs: tuple, block: Array, size: int, values: tuple) -> None:
    for ref, value in zip(refs, values, strict=True):
        place = piece(block, size)
        ref[place] = jnp.broadcast_to(jnp.asarray(value, ref.dtype), (size, *ref.shape[1:]))


def _backward(q, k, v, mask, seed, out_grad, lse, delta, call, tiles):
    """Gradients of q, k, v, and of the slopes or None."""
    p = given.problem(q, k, tiles.forward, call)
    (T, S), visits = p.padded, given.table(mask, p, axis=1)
    query = Block((None, T, p.group, p.H), lambda h, b: (b, 0, h, 0))
    key = Block((None, S, None, p.H), lambda h, b: (b, 0, h, 0))
    row = Block((None, p.group, T), lambda h, b: (b, h, 0))
    out = ((p.B, S, p.K, p.H), k.dtype, key)
    outputs = [out, out, ((p.B, T, p.N, p.H), jnp.float32, query)]
    if mask.slopes is not None:
        outputs.append(((p.B, p.N, T), jnp.float32, row))
    context = given.context_blocks(mask, seed, visits, p, whole_table=True)
    k_grad, v_grad, q_grad, *slopes_grad = launch(
        partial(_backward_kernel, p=p),
        "flash1_backward",
        (p.K, p.B),
        (query, key, key, query, row, row, *context),
        outputs,
        p.tile,
        call.interpret,
    )(*given.padded(p, q, k, v, out_grad, lse, delta), *given.context(mask, seed, visits, p))
    H = q.shape[-1]
    return (
        (q_grad * p.score.scale)[:, : p.T, :, :H].astype(q.dtype),
        k_grad[:, : p.S, :, :H],
        v_grad[:, : p.S, :, :H],
        slopes_grad[0].sum((0, 2)) if slopes_grad else None,
    )


def _backward_kernel(
    q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, mask_ref, seed_ref, visits_ref,
    k_out, v_out, q_out, *slopes_out, p: Problem,
):  # fmt: skip
    h, b, size = program(0), program(1), p.tile.query
    view = View(p, mask_ref, seed_ref, b)

    def fill(m: Array, _: Any) -> None:
        g, i = lax.rem(m, p.group), divide(m, p.group)
        q_out[(piece(i, size), g)] = jnp.zeros((size, p.H))
        for ref in slopes_out:
            ref[(g, piece(i, size))] = jnp.zeros(size)

    lax.fori_loop(0, p.blocks[0] * p.group, fill, None)
    barrier(p.call.interpret)

    def key_block(j: Array, _: Any) -> None:
        k, v = rows(k_ref, j, p.tile.key), rows(v_ref, j, p.tile.key)

        def head(g: Array, carry: tuple) -> tuple:
            n = h * p.group + g

            def step(i: Array, carry: tuple, masked: bool) -> tuple:
                k_grad, v_grad = carry
                place = piece(i, size)
                q, out_grad = q_ref[place, g], grad_ref[place, g]
                scores, capped = view.scores(dot(q, k.T), n, i, j, masked)
                lse, delta = lse_ref[g, place][:, None], delta_ref[g, place][:, None]
                product = dot(out_grad, v.T)
                weights, grad = tile_grads(scores, lse, product, delta, view.kept(n, i, j))
                totals = [ref[g, place] + (grad * view.gaps(i, j)).sum(1) for ref in slopes_out]
                grad = unbent_grad(grad, capped, p.score).astype(k.dtype)
                q_grad = q_out[place, g] + dot(grad, k)
                barrier(p.call.interpret)
                q_out[place, g] = q_grad
                for ref, total in zip(slopes_out, totals, strict=True):
                    ref[g, place] = total
                barrier(p.call.interpret)
                weights = weights.astype(v.dtype)
                return k_grad + dot(grad.T, q), v_grad + dot(weights.T, out_grad)

            return walk(step, visits_ref, carry, j)

        zeros = jnp.zeros((p.tile.key, p.H))
        k_grad, v_grad = lax.fori_loop(0, p.group, head, (zeros, zeros))
        k_out[piece(j, p.tile.key), :] = (k_grad * p.score.scale).astype(k_out.dtype)
        v_out[piece(j, p.tile.key), :] = v_grad.astype(v_out.dtype)

    lax.fori_loop(0, p.blocks[1], key_block, None)


def flash1_tiles(H: int, dtype: Any, device_kind: str | None = None) -> FlashTiles:
    """Its backward pass holds more of a tile than those of `flash2` do: wide heads have half the keys."""
    tiles = flash_tiles(H, dtype, device_kind)
    narrow = H > 64 and jnp.dtype(dtype) != jnp.float32
    return replace(tiles, forward=Tile(64, 32, 8, 2)) if narrow else tiles


flash1 = attention("flash1", _forward, _backward, flash1_tiles)
