"""Attention of a few new tokens on a long cache, as a Pallas kernel: split-K decoding.

One query gives a GPU nothing to do: B * N programs, each reading a whole cache. So the keys are split
into parts that run at once ("flash decoding", Dao et al. 2023, pytorch.org/blog/flash-decoding), and
their peaks, sums and undivided results are combined afterwards. The query heads that share a key/value
head are rows of one tile, so that its keys are read once for all of them. The gradients are those of
the plain form.

The cache is not copied to fill whole tiles: its last tile is shifted back to end where the cache ends,
and keys that the tile before it had are hidden. Only a cache whose heads are no power of 2 is copied.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from research.kernels import operands
from research.kernels.attend import check_inputs, reference
from research.kernels.mask import Mask
from research.kernels.online import (
    MASKED,
    Rows,
    Score,
    absorb,
    begin,
    bent,
    dot,
    finish,
    masked_scores,
    scoring,
)
from research.kernels.tiles import Tiles, visit_table, walk
from research.kernels.triton import Block, Tile, launch, program, require, span
from research.types import Array

FEW = 16  # queries of a call, at most
# Rows of one tile: queries times the heads that share keys. More do not stay in registers.
MOST_ROWS = 64
PROGRAMS = 264  # two for each multiprocessor of an H100


def flash_decode(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    tile: int | None = None,
    parts: int | None = None,
    interpret: bool | None = None,
) -> Array:
    """The contract of `research.kernels.attend` for at most FEW queries, without dropout.

    `tile` keys at a time, by default 64, of wide heads 32; `parts` of the cache at once, by default enough to fill a GPU. ValueError
    for more queries, or more than MOST_ROWS of them with the heads that share keys, and where `flash2`
    raises one.
    """
    here = require(interpret, "flash_decode")
    check_inputs(q, k, v, mask)
    operands.check_operands(q, k, v, "flash_decode")
    (T, N, H), K = q.shape[1:], k.shape[2]
    if T > FEW or N // K * T > MOST_ROWS:
        raise ValueError(
            f"flash_decode takes at most {FEW} queries and {MOST_ROWS} rows of queries for a key head, "
            f"not {T} and {N // K * T}: take 'flash2'"
        )
    if parts is not None and parts < 1:
        raise ValueError(f"a cache is read in 1 part or more, not {parts}")
    tile = (64 if H <= 128 else 32) if tile is None else tile
    score, _ = scoring(H, scale, softcap, None)
    return _attention(q, k, v, mask.slopes, mask.replace(slopes=None), score, (tile, parts, here))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, slopes, mask, score, how):
    return _forward(q, k, v, mask.replace(slopes=slopes), score, *how)


def _attention_forward(q, k, v, slopes, mask, score, how):
    return _attention(q, k, v, slopes, mask, score, how), (q, k, v, slopes, mask)


def _attention_backward(score, how, saved, out_grad):
    """That of the plain form: a few rows of scores are no larger than the cache."""
    q, k, v, slopes, mask = saved

    def plain(q, k, v, slopes):
        return reference(q, k, v, mask.replace(slopes=slopes), score.scale, softcap=score.softcap)

    return *jax.vjp(plain, q, k, v, slopes)[1](out_grad), None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(q, k, v, mask, score, tile, parts, interpret):
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    width, keys = operands.power_of_two(H), max(16, min(tile, operands.power_of_two(S + 1) // 2))
    k, v = (operands.pad(x, max(S, keys), width) for x in (k, v))
    visits = visit_table(mask, T, S, Tiles(T, keys), axis=2)
    parts = min(-(-S // keys), max(1, PROGRAMS // (B * K))) if parts is None else parts
    rows = operands.fitting(N // K * T, MOST_ROWS)
    row_mask = _row_mask(mask, T, K, rows, k.shape[1])
    args = _pack(q, K, rows, width), k, v, row_mask, visits
    out = _combine(
        *_launch(args, score, S, Tile(rows, keys, 8 if width > 128 else 4), parts, interpret)
    )
    return _unpack(out, q)


def _pack(q: Array, K: int, rows: int, width: int) -> Array:
    """[B, T, N, H] -> [B, K, rows, width]: rows are (query head of the group, query), then padding."""
    B, T, N, H = q.shape
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - q.shape[2]), (0, width - H)))


def _unpack(out: Array, q: Array) -> Array:
    """[B, K, rows, width] -> [B, T, N, H], as q is."""
    (B, T, N, H), K = q.shape, out.shape[1]
    out = out[:, :, : N // K * T, :H].reshape(B, K, N // K, T, H)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _row_mask(mask: Mask, T: int, K: int, rows: int, S: int) -> tuple[Mask, Array]:
    """The mask with arrays for each packed row, and the rows' query indices [rows]."""
    query = jnp.arange(rows, dtype=jnp.int32) % T
    mask = mask.replace(offset=jnp.reshape(jnp.asarray(mask.offset, jnp.int32), 1))
    if mask.slopes is not None:
        slopes = jnp.repeat(mask.slopes.astype(jnp.float32).reshape(K, -1), T, axis=1)
        mask = mask.replace(slopes=jnp.pad(slopes, ((0, 0), (0, rows - slopes.shape[1]))))
    if mask.query_segments is not None:
        mask = mask.replace(
            query_segments=mask.query_segments.astype(jnp.int32)[:, query],
            key_segments=operands.pad(mask.key_segments.astype(jnp.int32), S),
        )
    return mask, query


def _launch(args, score: Score, S: int, tile: Tile, parts: int, interpret: bool):
    """Undivided result [parts, B, K, rows, H], peak and sum [parts, B, K, rows] of every part."""
    q, k, _, (mask, _), visits = args
    (B, K, rows, H), length = q.shape, k.shape[1]
    blocks = {
        "offset": Block((1,), lambda s, h, b: (0,)),
        "prefix": Block((1,), lambda s, h, b: (b,)),
        "query_segments": Block((None, rows), lambda s, h, b: (b, 0)),
        "key_segments": Block((None, length), lambda s, h, b: (b, 0)),
        "slopes": Block((None, rows), lambda s, h, b: (h, 0)),
    }
    used = {name: block for name, block in blocks.items() if getattr(mask, name) is not None}
    per_row = visits.shape[0] > 1
    cache = Block((None, length, None, H), lambda s, h, b: (b, 0, h, 0))
    row = Block((None, None, None, rows), lambda s, h, b: (s, b, h, 0))
    out = Block((None, None, None, rows, H), lambda s, h, b: (s, b, h, 0, 0))
    return launch(
        partial(_kernel, score=score, S=S, keys=tile.key, parts=parts),
        "flash_decode",
        (parts, K, B),
        (
            Block((None, None, rows, H), lambda s, h, b: (b, h, 0, 0)),
            cache,
            cache,
            (mask.replace(**used), Block((rows,), lambda s, h, b: (0,))),
            Block((None, None, *visits.shape[2:]), lambda s, h, b: (b if per_row else 0, 0, 0, 0)),
        ),
        (
            ((parts, B, K, rows, H), jnp.float32, out),
            ((parts, B, K, rows), jnp.float32, row),
            ((parts, B, K, rows), jnp.float32, row),
        ),
        tile,
        interpret,
    )(*args)


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    mask_refs,
    visits_ref,
    out_ref,
    peak_ref,
    total_ref,
    *,
    score,
    S,
    keys,
    parts,
):
    mask_ref, query_ref = mask_refs
    q, query, length = q_ref[...], query_ref[...][:, None], k_ref.shape[0]

    def step(j, state, masked):
        start = jnp.minimum(j * keys, length - keys)
        key = (start + lax.iota(jnp.int32, keys))[None, :]
        mask, place = _tile_mask(mask_ref, start, keys), span(start, keys)
        scores = masked_scores(bent(dot(q, k_ref[place].T), score), mask, query, key, S, masked)
        return absorb(state, jnp.where(key < j * keys, MASKED, scores), v_ref[place])

    state = walk(step, visits_ref, begin(*q.shape), share=(program(0), parts))
    out_ref[...], peak_ref[...], total_ref[...] = state.out, state.peak, state.total


def _tile_mask(mask: Mask, start: Array, keys: int) -> Mask:
    """What the program's rows and these keys know of the mask, from its references."""
    tile = mask.replace(offset=mask.offset[0])
    if mask.prefix is not None:
        tile = tile.replace(prefix=mask.prefix[0])
    if mask.slopes is not None:
        tile = tile.replace(slopes=mask.slopes[...][:, None])
    if mask.query_segments is not None:
        tile = tile.replace(
            query_segments=mask.query_segments[...][:, None],
            key_segments=mask.key_segments[span(start, keys)][None, :],
        )
    return tile


def _combine(out: Array, peak: Array, total: Array) -> Array:
    """Parts on the leading axis -> the divided result [B, K, rows, H]."""
    greatest = peak.max(0)
    weight = jnp.exp2(peak - greatest)
    state = Rows(greatest, (total * weight).sum(0), (out * weight[..., None]).sum(0))
    return finish(state)[0]
