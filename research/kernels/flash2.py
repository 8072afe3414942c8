"""FlashAttention-2 as Pallas kernels for a GPU (Dao 2023, arXiv:2307.08691).

    forward   a program per query block and head: walks over the keys it sees, keeps peak, sum and
              undivided result on chip, divides once at the end; leaves the log-sum-exp of each row
    queries   the same programs again for dq
    keys      a program per key block and key/value head for dk and dv: walks over the queries that
              see it, of all the heads that share it, on transposed tiles Sᵀ = K·Qᵀ, where both
              gradients are plain products

dq and dk, dv come from two kernels, which computes the scores twice in the backward pass (7 products
instead of 5), and in exchange adds nothing atomically: results do not depend on the order of
programs, and are the same bits every time. Which tiles are visited is decided outside (`tiles`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from research.kernels import operands as given
from research.kernels.flash import attention
from research.kernels.online import absorb, begin, dot, finish, tile_grads, unbent_grad
from research.kernels.operands import Problem, View
from research.kernels.tiles import walk
from research.kernels.triton import Block, divide, launch, piece, program, rows

# Programs of a grid are (block, head, batch row). Query blocks count down: under a causal mask the
# last ones have most to do, and should not be the ones that the others wait for.


def _query_blocks(p: Problem) -> tuple[Block, Block, Block]:
    """A query block of [B, T, N, H], the keys it may see of [B, S, K, H], its part of [B, N, T]."""
    last, S = p.blocks[0] - 1, p.padded[1]
    return (
        Block((None, p.tile.query, None, p.H), lambda x, n, b: (b, last - x, n, 0)),
        Block((None, S, None, p.H), lambda x, n, b: (b, 0, divide(n, p.group), 0)),
        Block((None, None, p.tile.query), lambda x, n, b: (b, n, last - x)),
    )


def _key_blocks(p: Problem) -> tuple[Block, Block, Block]:
    """All queries of a group of heads, a key block, and the group's part of [B, N, T]."""
    T = p.padded[0]
    return (
        Block((None, T, p.group, p.H), lambda x, h, b: (b, 0, h, 0)),
        Block((None, p.tile.key, None, p.H), lambda x, h, b: (b, x, h, 0)),
        Block((None, p.group, T), lambda x, h, b: (b, h, 0)),
    )


def _forward(q, k, v, mask, seed, call, tiles):
    """out [B, T, N, H] and the log-sum-exp of every row, [B, N, T] float32 in base 2."""
    p = given.problem(q, k, tiles.forward, call)
    (T, S), visits = p.padded, given.table(mask, p, axis=2)
    query, key, row = _query_blocks(p)
    out, lse = launch(
        partial(_forward_kernel, p=p),
        "flash2_forward",
        (p.blocks[0], p.N, p.B),
        (query, key, key, *given.context_blocks(mask, seed, visits, p, reverse=True)),
        (((p.B, T, p.N, p.H), q.dtype, query), ((p.B, p.N, T), jnp.float32, row)),
        p.tile,
        call.interpret,
    )(
        given.pad(q, T, p.H),
        given.pad(k, S, p.H),
        given.pad(v, S, p.H),
        *given.context(mask, seed, visits, p),
    )
    return out[:, : p.T, :, : q.shape[-1]], lse[..., : p.T]


def _forward_kernel(q_ref, k_ref, v_ref, mask_ref, seed_ref, visits_ref, out_ref, lse_ref, *, p):
    i, n, b = p.blocks[0] - 1 - program(0), program(1), program(2)
    view, q = View(p, mask_ref, seed_ref, b), q_ref[...]

    def step(j, state, masked):
        k, v = rows(k_ref, j, p.tile.key), rows(v_ref, j, p.tile.key)
        scores, _ = view.scores(dot(q, k.T), n, i, j, masked)
        return absorb(state, scores, v, view.kept(n, i, j))

    out, lse = finish(walk(step, visits_ref, begin(p.tile.query, p.H)))
    out_ref[...], lse_ref[...] = out.astype(out_ref.dtype), lse


def _queries(q, k, v, mask, seed, out_grad, lse, delta, call, tile):
    """(dq, gradient of the slopes [N] or None)."""
    p = given.problem(q, k, tile, call)
    T, visits = p.padded[0], given.table(mask, p, axis=2)
    query, key, row = _query_blocks(p)
    outputs = [((p.B, T, p.N, p.H), q.dtype, query)]
    if mask.slopes is not None:
        outputs.append(((p.B, p.N, T), jnp.float32, row))
    q_grad, *slopes_grad = launch(
        partial(_queries_kernel, p=p),
        "flash2_queries",
        (p.blocks[0], p.N, p.B),
        (
            query,
            key,
            key,
            query,
            row,
            row,
            *given.context_blocks(mask, seed, visits, p, reverse=True),
        ),
        outputs,
        p.tile,
        call.interpret,
    )(*given.padded(p, q, k, v, out_grad, lse, delta), *given.context(mask, seed, visits, p))
    slopes_grad = slopes_grad[0].sum((0, 2)) if slopes_grad else None
    return q_grad[:, : p.T, :, : q.shape[-1]], slopes_grad


def _queries_kernel(
    q_ref, k_ref, v_ref, out_grad_ref, lse_ref, delta_ref, mask_ref, seed_ref, visits_ref, *outs, p
):
    i, n, b = p.blocks[0] - 1 - program(0), program(1), program(2)
    view, q, out_grad = View(p, mask_ref, seed_ref, b), q_ref[...], out_grad_ref[...]
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]

    def step(j, carry, masked):
        q_grad, *slopes_grad = carry
        k, v = rows(k_ref, j, p.tile.key), rows(v_ref, j, p.tile.key)
        scores, capped = view.scores(dot(q, k.T), n, i, j, masked)
        _, grad = tile_grads(scores, lse, dot(out_grad, v.T), delta, view.kept(n, i, j))
        slopes_grad = [total + (grad * view.gaps(i, j)).sum(1) for total in slopes_grad]
        grad = unbent_grad(grad, capped, p.score).astype(k.dtype)
        return q_grad + dot(grad, k), *slopes_grad

    start = jnp.zeros((p.tile.query, p.H)), *(jnp.zeros(p.tile.query) for _ in outs[1:])
    q_grad, *slopes_grad = walk(step, visits_ref, start)
    outs[0][...] = (q_grad * p.score.scale).astype(outs[0].dtype)
    for ref, total in zip(outs[1:], slopes_grad, strict=True):
        ref[...] = total


def _keys(q, k, v, mask, seed, out_grad, lse, delta, call, tile):
    """(dk, dv)."""
    p = given.problem(q, k, tile, call)
    S, visits = p.padded[1], given.table(mask, p, axis=1)
    query, key, row = _key_blocks(p)
    output = ((p.B, S, p.K, p.H), k.dtype, key)
    k_grad, v_grad = launch(
        partial(_keys_kernel, p=p),
        "flash2_keys",
        (p.blocks[1], p.K, p.B),
        (query, key, key, query, row, row, *given.context_blocks(mask, seed, visits, p)),
        (output, output),
        p.tile,
        call.interpret,
    )(*given.padded(p, q, k, v, out_grad, lse, delta), *given.context(mask, seed, visits, p))
    return k_grad[:, : p.S, :, : k.shape[-1]], v_grad[:, : p.S, :, : k.shape[-1]]


def _keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_grad_ref,
    lse_ref,
    delta_ref,
    mask_ref,
    seed_ref,
    visits_ref,
    k_out,
    v_out,
    *,
    p,
):
    j, h, b = program(0), program(1), program(2)
    view, k, v = View(p, mask_ref, seed_ref, b, transposed=True), k_ref[...], v_ref[...]

    def head(g, carry):
        n = h * p.group + g

        def step(i, carry, masked):
            k_grad, v_grad = carry
            place = piece(i, p.tile.query)
            q, out_grad = q_ref[place, g], out_grad_ref[place, g]
            lse, delta = lse_ref[g, place], delta_ref[g, place]
            scores, capped = view.scores(dot(k, q.T), n, i, j, masked)
            product = dot(v, out_grad.T)
            weights, grad = tile_grads(scores, lse[None], product, delta[None], view.kept(n, i, j))
            grad = unbent_grad(grad, capped, p.score).astype(q.dtype)
            return k_grad + dot(grad, q), v_grad + dot(weights.astype(q.dtype), out_grad)

        return walk(step, visits_ref, carry)

    zeros = jnp.zeros((p.tile.key, p.H))
    k_grad, v_grad = jax.lax.fori_loop(0, p.group, head, (zeros, zeros))
    k_out[...] = (k_grad * p.score.scale).astype(k_out.dtype)
    v_out[...] = v_grad.astype(v_out.dtype)


def _backward(*args):
    *args, tiles = args
    q_grad, slopes_grad = _queries(*args, tiles.queries)
    return q_grad, *_keys(*args, tiles.keys), slopes_grad


flash2 = attention("flash2", _forward, _backward)
