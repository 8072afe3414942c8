"""How a LoRA begins: functions for `lora.add(..., initial=...)`.

    initial(name, w, key, rank, scale) -> (base, a, b)     w [..., in, out], a [..., in, R], b [..., R, out]

and base + scale * a b is w, whatever the function: no model changes when a LoRA is added.

    uniform   a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0: the default. Hu et al. 2021 (arXiv:2106.09685)
    gaussian  a ~ N(0, 1/R²), b = 0
    pissa     W = U S Vᵀ; a = U_R sqrt(S_R), b = sqrt(S_R) V_Rᵀ, both over sqrt(scale): the largest R
              singular values train. Meng et al. 2024 (arXiv:2404.02948)
    olora     Wᵀ = Q T; a = T_Rᵀ, b = Q_Rᵀ: the rows of b are orthonormal. Büyükakyüz 2024
              (arXiv:2406.01775)

All are as in Hugging Face PEFT. For an embedding table uniform and gaussian have a = 0 and
b ~ N(0, 1). pissa and olora take `scale * a b` off the base, so the base is not the model's own
matrix any more, but a residual that is good for nothing alone, and both factors have a gradient
from the first step. They refuse a quantized base: it would have to be quantized anew (add first,
and quantize the base then: QPiSSA).

Differs from the paper: the factors of olora are not divided by the scale, as in PEFT, so that with
a scale other than 1 what is left is W less `scale` times the leading part of Q T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from research.types import Array
from research.weights.base import is_weight, matrix_shape

# (path, array or Weight, key, rank, scale) -> (base, a, b)
Initial = Callable[[str, Any, Array, int, float], tuple[Any, Array, Array]]


def uniform(name: str, w: Any, key: Array, rank: int, scale: float) -> tuple[Any, Array, Array]:
    """a of the size that a fresh layer's matrix would have, b = 0."""

    def draw(key: Array, shape: tuple) -> Array:
        bound = shape[-2] ** -0.5
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    return beside(name, w, key, rank, draw)


def gaussian(name: str, w: Any, key: Array, rank: int, scale: float) -> tuple[Any, Array, Array]:
    """a of standard deviation 1/R, b = 0."""
    return beside(name, w, key, rank, lambda key, shape: jax.random.normal(key, shape) / rank)


def beside(
    name: str, w: Any, key: Array, rank: int, draw: Callable[[Array, tuple], Array]
) -> tuple[Any, Array, Array]:
    """Factors of product zero beside an unchanged base; `draw` makes a kernel's a."""
    *layers, inner, outer = matrix_shape("LoRA", name, w, rank)
    if name.endswith("/table"):
        return w, jnp.zeros((*layers, inner, rank)), jax.random.normal(key, (*layers, rank, outer))
    return w, draw(key, (*layers, inner, rank)), jnp.zeros((*layers, rank, outer))


def pissa(name: str, w: Any, key: Array, rank: int, scale: float) -> tuple[Any, Array, Array]:
    """The leading singular triples, from a full SVD."""
    u, s, vt = jnp.linalg.svd(own_matrix("PiSSA", name, w, rank), full_matrices=False)
    return principal(w, u, s, vt, rank, scale)


@dataclass(frozen=True)
class FastPissa:
    """pissa from a randomised SVD (Halko et al. 2011, arXiv:0909.4061): for large matrices.

    W is seen only by R + `spare` vectors, `iterations` times from either side. The singular values
    are approximate; base + scale * a b is W all the same.
    """

    iterations: int = 16
    spare: int = 8

    def __call__(
        self, name: str, w: Any, key: Array, rank: int, scale: float
    ) -> tuple[Any, Array, Array]:
        matrix = own_matrix("PiSSA", name, w, rank)
        *layers, inner, outer = matrix.shape
        width = min(rank + self.spare, inner, outer)
        q = matrix @ jax.random.normal(key, (*layers, outer, width))
        for _ in range(self.iterations):
            q = jnp.linalg.qr(q)[0]
            q = matrix @ jnp.linalg.qr(matrix.mT @ q)[0]
        q = jnp.linalg.qr(q)[0]
        u, s, vt = jnp.linalg.svd(q.mT @ matrix, full_matrices=False)
        return principal(w, q @ u, s, vt, rank, scale)


def principal(
    w: Array, u: Array, s: Array, vt: Array, rank: int, scale: float
) -> tuple[Array, Array, Array]:
    """Factors from the first `rank` singular triples, in falling order, and what they leave of w."""
    root = jnp.sqrt(s[..., :rank] / scale)
    a, b = u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
    return residual(w, a, b, scale), a, b


def olora(name: str, w: Any, key: Array, rank: int, scale: float) -> tuple[Any, Array, Array]:
    """The leading columns of Q and rows of T, from a QR decomposition of Wᵀ."""
    q, t = jnp.linalg.qr(own_matrix("OLoRA", name, w, rank).mT)
    a, b = t[..., :rank, :].mT, q[..., :, :rank].mT
    return residual(w, a, b, scale), a, b


def own_matrix(method: str, name: str, w: Any, rank: int) -> Array:
    """w in float32; ValueError where its base cannot be changed or `rank` is more than it has."""
    matrix_shape(method, name, w, rank)
    if is_weight(w):
        raise ValueError(
            f"{method} changes the base, which must be an array; {name} is a {type(w).__name__}"
        )
    return w.astype(jnp.float32)


def residual(w: Array, a: Array, b: Array, scale: float) -> Array:
    """w - scale * a b, in the dtype of w."""
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) - scale * product).astype(w.dtype)
