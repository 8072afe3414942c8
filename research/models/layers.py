"""The layers every family is made of: Linear, Embedding, norms, Mlp, GatedMlp, NormHead.

A layer fetches its matrix as it lies in the parameters, an array or a Weight, and multiplies
through `weights.base.matmul`: no layer knows about LoRA or quantization. Matrices are [in, out].
Computation is in the dtype of the input; norms in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models.init import Init, Normal
from research.types import Array
from research.weights import base


def leaf(module: nn.Module, name: str, init: Init, shape: tuple, axes: tuple) -> Any:
    """The module's parameter `name`: an array of `shape`, or the Weight that stands for it.

    `axes` names the logical axes; the names are seen only by `eval_shape` of `init`.
    Raises ValueError naming the parameter when an array has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, nn.with_partitioning(init, axes), shape)
    value = module.get_variable("params", name)
    if isinstance(value, nn.Partitioned):  # straight from Linen's `init`
        value = value.value
    if not base.is_weight(value) and value.shape != shape:
        path = "/".join((*module.path, name))
        raise ValueError(f"parameter {path!r} has shape {value.shape}, the config says {shape}")
    return value


def call_of(module: nn.Module) -> base.Call:
    """Dropout happens exactly when a 'dropout' rng was given to `apply`."""
    has_rng = module.has_rng("dropout")
    return base.Call(dropout=module.make_rng("dropout") if has_rng else None)


def dropout(module: nn.Module, x: Array, rate: float) -> Array:
    """Each entry 0 with probability `rate`, else divided by 1 - rate; x itself without an rng.

    Srivastava et al. 2014. Every call in one forward pass draws anew.
    """
    if rate == 0 or not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


class Linear(nn.Module):
    """x [..., in] -> x W + b, [..., features]."""

    features: int
    axes: tuple[str | None, str | None]
    bias: bool = False
    kernel_init: Init = Normal(0.02)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        y = base.matmul(x, leaf(self, "kernel", self.kernel_init, shape, self.axes), call_of(self))
        if self.bias:
            b = leaf(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])
            y = y + b.astype(y.dtype)
        return y


class NormHead(nn.Module):
    """x W with every column of W, a token's vector, at length 1: [..., in] -> [..., features] float32.

    Baichuan 2 (arXiv:2309.10305). The parameters hold W as it is trained, and a length below `eps`
    counts as `eps`. The lengths cost a second look at W in every call; for decoding
    `families.baichuan.fold_head` gives the Linear that computes the same.
    """

    features: int
    axes: tuple[str | None, str | None] = ("embed", "vocab")
    eps: float = 1e-12

    @nn.compact
    def __call__(self, x: Array) -> Array:
        w = leaf(self, "kernel", Normal(0.02), (x.shape[-1], self.features), self.axes)
        y = base.matmul(x, w, call_of(self)).astype(jnp.float32)
        squares = jnp.square(base.dense(w).astype(jnp.float32)).sum(axis=0)
        return y * jax.lax.rsqrt(jnp.maximum(squares, self.eps**2))


class Embedding(nn.Module):
    """ids [...] -> rows of a [rows, width] table; `attend` multiplies by its transpose.

    `axis` is the logical name of the rows.
    """

    rows: int
    width: int
    init_std: float = 0.02
    axis: str | None = "vocab"

    def setup(self):
        shape, names = (self.rows, self.width), (self.axis, "embed")
        self.table = leaf(self, "table", Normal(self.init_std), shape, names)

    def __call__(self, ids: Array) -> Array:
        return base.take(self.table, ids, call_of(self))

    def attend(self, x: Array) -> Array:
        """x [..., width] -> logits [..., rows]: a head tied to the table."""
        return base.matmul_transposed(x, self.table, call_of(self))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * scale, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = leaf(self, "scale", nn.initializers.ones, x.shape[-1:], ("embed",))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = leaf(self, "scale", nn.initializers.ones, x.shape[-1:], ("embed",))
        bias = leaf(self, "bias", nn.initializers.zeros, x.shape[-1:], ("embed",))
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


class Mlp(nn.Module):
    """activation(x W_up) W_down."""

    features: int
    activation: Callable[[Array], Array] = nn.gelu
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        up = Linear(self.features, ("embed", "ffn"), self.bias, name="up")(x)
        return Linear(x.shape[-1], ("ffn", "embed"), self.bias, name="down")(self.activation(up))


class GatedMlp(nn.Module):
    """(activation(x W_gate) * x W_up) W_down; SwiGLU with silu (Shazeer 2020, arXiv:2002.05202)."""

    features: int
    activation: Callable[[Array], Array] = nn.silu
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate = Linear(self.features, ("embed", "ffn"), self.bias, name="gate")(x)
        up = Linear(self.features, ("embed", "ffn"), self.bias, name="up")(x)
        inner = self.activation(gate) * up
        return Linear(x.shape[-1], ("ffn", "embed"), self.bias, name="down")(inner)
