"""Linear attention: a sum over the past in place of a softmax, and a cache of constant size.

Katharopoulos et al. 2020 (arXiv:2006.16236), equations 8 to 20:

    y_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t,    S_t = S_{t-1} + φ(k_t) v_tᵀ,    z_t = z_{t-1} + φ(k_t)

with φ(x) = elu(x) + 1. Training goes over chunks: inside one the T×T form, between them (S, z).
Rotations of a position scheme turn φ(q) and φ(k) in S and not in z (Su et al. 2021,
arXiv:2104.09864, equation 19), so that what is divided by stays positive.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from research.models.attention import Inputs
from research.models.layers import Linear
from research.types import Array


@struct.dataclass
class LinearState:
    """What a layer remembers: S [B, K, H, H], z [B, K, H] float32, and the segment [B] they are of."""

    products: Array
    keys: Array
    segment: Array


def elu_plus_one(x: Array) -> Array:
    """x + 1 above 0, exp(x) below: positive everywhere, with a gradient everywhere."""
    return nn.elu(x) + 1


class LinearAttention(nn.Module):
    """x [B, T, D] -> [B, T, D] with Attention's parameters and interface; there is no scale.

    A row's segments are runs: the state begins anew where the segment id changes, padding (0)
    between two tokens of one segment apart. ValueError for what a running sum cannot do: windows,
    prefix-LM and bidirectional masks, ALiBi.
    """

    heads: int
    kv_heads: int
    head_size: int
    bias: bool = False
    out_bias: bool = False
    feature_map: Callable[[Array], Array] = elu_plus_one
    chunk: int = 64

    @nn.compact
    def __call__(
        self, x: Array, inputs: Inputs, cache: LinearState | None = None
    ) -> tuple[Array, LinearState | None]:
        B, T, D = x.shape
        self._check(inputs)
        axes = {"q": (self.heads, "heads"), "k": (self.kv_heads, "kv_heads")}
        axes["v"] = axes["k"]
        q, k, v = (
            Linear(count * self.head_size, ("embed", axis), self.bias, name=name)(x)
            .reshape(B, T, count, self.head_size)
            .astype(jnp.float32)
            for name, (count, axis) in axes.items()
        )
        q, k = self.feature_map(q), self.feature_map(k)
        rotate = partial(inputs.position.rotate, tables=inputs.tables)
        segments = inputs.mask.query_segments
        segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
        state = self.empty_cache(B) if cache is None else cache
        y, state = linear_attention(q, k, v, segments, state, rotate, self.chunk)
        y = y.reshape(B, T, -1).astype(x.dtype)
        y = Linear(D, ("heads", "embed"), self.out_bias, name="o")(y)
        return y, None if cache is None else state

    def _check(self, inputs: Inputs) -> None:
        mask = inputs.mask
        slopes = inputs.position.slopes(self.heads)
        wrong = {
            "window": mask.window is not None,
            "prefix": mask.prefix is not None,
            "bidirectional mask": not mask.causal,
            "ALiBi slopes": slopes is not None or mask.slopes is not None,
        }
        if any(wrong.values()):
            named = ", ".join(name for name, is_so in wrong.items() if is_so)
            raise ValueError(f"LinearAttention sums over the whole past: it can have no {named}")

    def empty_cache(self, batch: int, length: int | None = None, dtype: Any = None) -> LinearState:
        """Of one size whatever the length, and in float32, as it is a sum over the past."""
        shape = (batch, self.kv_heads, self.head_size)
        products = jnp.zeros((*shape, self.head_size), jnp.float32)
        return LinearState(products, jnp.zeros(shape, jnp.float32), jnp.zeros(batch, jnp.int32))


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    state: LinearState,
    rotate: Callable[[Array], Array] = lambda x: x,
    chunk: int = 64,
) -> tuple[Array, LinearState]:
    """Features q [B, T, N, H] >= 0 and k, values v [B, T, K, H], segments [B, T] -> [B, T, N, H].

    Query head n reads head n // (N // K). Padding gives zeros and leaves the state as it was.
    """
    B, T, N, H = q.shape
    K, size = k.shape[2], min(chunk, T)
    q, turned_q, turned_k = (each.reshape(B, T, K, -1, H) for each in (q, rotate(q), rotate(k)))
    parts = (q, turned_q, k, turned_k[:, :, :, 0], v, segments)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    state, y = lax.scan(_chunk, state, jax.tree.map(chunks, parts))
    return jnp.moveaxis(y, 0, 1).reshape(B, -1, N, H)[:, :T], state


def _chunk(state: LinearState, parts: tuple[Array, ...]) -> tuple[LinearState, Array]:
    """One chunk of C tokens: what is inside it, and the state for what came before."""
    q, turned_q, k, turned_k, v, segments = parts
    real, runs, last = _runs(segments, state.segment)
    C = segments.shape[1]
    visible = (runs[:, :, None] == runs[:, None, :]) & real[:, None, :]
    visible = (visible & jnp.tril(jnp.ones((C, C), bool)))[:, None, None]  # [B, 1, 1, C, C]
    before = (runs == 0)[:, :, None, None]  # the run that the state is of
    scores = jnp.einsum("btkgh,bskh->bkgts", turned_q, turned_k)
    over = jnp.einsum("bkgts,bske->btkge", jnp.where(visible, scores, 0), v)
    over += before[..., None] * jnp.einsum("btkgh,bkhe->btkge", turned_q, state.products)
    under = jnp.einsum("btkgh,bskh->bkgts", q, k)
    under = jnp.moveaxis(jnp.where(visible, under, 0).sum(-1), 3, 1)  # [B, C, K, G]
    under += before * jnp.einsum("btkgh,bkh->btkg", q, state.keys)
    usable = (under > 0) & real[:, :, None, None]
    y = jnp.where(usable[..., None], over / jnp.where(usable, under, 1)[..., None], 0)
    adds = (real & (runs == runs[:, -1:]))[:, :, None, None]
    same = runs[:, -1] == 0
    products = jnp.einsum("bskh,bske->bkhe", adds * turned_k, v)
    new = LinearState(
        jnp.where(same[:, None, None, None], state.products, 0) + products,
        jnp.where(same[:, None, None], state.keys, 0) + (adds * k).sum(1),
        last,
    )
    return new, y


def _runs(segments: Array, carried: Array) -> tuple[Array, Array, Array]:
    """Which tokens are real, the run of equal ids each stands in, and the last id.

    Run 0 is the one that `carried` [B] began; padding belongs to the run before it.
    """
    real = segments != 0
    index = jnp.where(real, jnp.arange(segments.shape[1]), -1)
    latest = lax.cummax(index, axis=1)
    filled = jnp.take_along_axis(segments, jnp.maximum(latest, 0), axis=1)
    filled = jnp.where(latest < 0, carried[:, None], filled)
    changed = jnp.diff(filled, axis=1, prepend=carried[:, None]) != 0
    return real, jnp.cumsum(changed, axis=1), filled[:, -1]
