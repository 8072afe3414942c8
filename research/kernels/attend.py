"""The attention contract, and its reference form that builds the T×S scores.

`attend(q, k, v, mask, scale=None) -> [B, T, N, H]`
    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K: query head n reads key/value head
    n // (N // K). Scores are q·k * scale (a Python number; 1/sqrt(H) when None), softmax in float32. A query that
    sees no key gives zeros. The result has q's dtype.

Every kernel has this signature: `reference` here, `native` and `blockwise` for a CPU, `flash2` and `flash1`
for a GPU, `attend_auto` that picks one. Most take two more arguments:

    dropout=(rate, rng)   each probability is 0 with that rate and divided by 1 - rate otherwise; one
                          rng drops the same ones in every kernel (`dropout.kept`), though others on each
                          device of a mesh (`sharded`)
    softcap=c             scaled scores x become c * tanh(x / c), before ALiBi is added (Gemma 2)

`require` refuses a kernel that cannot.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from research.kernels.dropout import check_rate, kept, seed_of
from research.kernels.mask import Mask, distance, to_dense
from research.types import Array

Attend = Callable[..., Array]


def check_inputs(q: Array, k: Array, v: Array, mask: Mask) -> None:
    """ValueError unless the shapes fit each other and the mask, as the contract has them."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k, v must be [B, T, N, H]; got {q.shape}, {k.shape}, {v.shape}")
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape != (B, S, K, H):
        raise ValueError(f"k and v must be [{B}, S, K, {H}]; got {k.shape} and {v.shape}")
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} key/value heads")
    if jnp.ndim(mask.offset) != 0:
        raise ValueError(f"mask.offset must be one number, not {jnp.shape(mask.offset)}")
    if mask.window is not None and mask.window < 1:
        raise ValueError(f"a window of {mask.window} keys sees nothing; it must be at least 1")
    if (mask.query_segments is None) != (mask.key_segments is None):
        raise ValueError("a mask has both query_segments and key_segments, or neither")
    wanted = {"prefix": (B,), "query_segments": (B, T), "key_segments": (B, S), "slopes": (N,)}
    for name, shape in wanted.items():
        value = getattr(mask, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"mask.{name} must be {shape} for these q and k, not {value.shape}")


def attention_weights(
    q: Array, k: Array, mask: Mask, scale: float | None = None, softcap: float | None = None
) -> Array:
    """softmax(q·kᵀ * scale + bias) over the visible keys: [B, N, T, S] float32."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(B, N, T, S)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask.slopes is not None:
        scores += mask.slopes[None, :, None, None] * distance(mask, T, S)
    return masked_softmax(scores, to_dense(mask, T, S))


def masked_softmax(scores: Array, visible: Array) -> Array:
    """Softmax over the last axis where `visible`, 0 elsewhere; 0 throughout where nothing is."""
    peak = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    # Softmax does not depend on the peak, so no gradient need flow through the search for it.
    peak = lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))
    # The double where: exp never sees a masked score, so no gradient is inf * 0.
    powers = jnp.where(visible, jnp.exp(jnp.where(visible, scores - peak, 0)), 0)
    total = powers.sum(-1, keepdims=True)
    return powers / jnp.where(total == 0, 1, total)


def reference(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float | None = None,
    dropout: tuple[float, Array] | None = None,
    softcap: float | None = None,
) -> Array:
    """The contract above, written out; memory grows as T×S."""
    check_inputs(q, k, v, mask)
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    weights = attention_weights(q, k, mask, scale, softcap)
    if dropout is not None:
        rate, rng = dropout
        check_rate(rate)
        heads = jnp.arange(B * N).reshape(B, N, 1, 1)
        weights *= kept(seed_of(rng), heads, jnp.arange(T)[:, None], jnp.arange(S), rate)
    weights = weights.reshape(B, K, N // K, T, S)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    return out.reshape(B, T, N, H).astype(q.dtype)


def require(attend: Attend, argument: str) -> None:
    """ValueError unless the kernel takes `dropout` or `softcap`, whichever is asked for."""
    if argument not in inspect.signature(attend).parameters:
        name = getattr(attend, "__name__", repr(attend))
        raise ValueError(
            f"the attention kernel {name} has no {argument}: leave Attention.{argument} at its default "
            f"or take a kernel that has, such as `reference` or `attend_auto`"
        )
