"""One layer of a trunk: attention and feed-forward, each in its residual connection.

A residual connection is a function (norm, sublayer, x) -> x, so that where the norm stands is a
part of a block like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flax import linen as nn

from research.models.attention import Attention, Inputs, LayerCache
from research.models.init import Rules, Xavier
from research.models.layers import RMSNorm, dropout
from research.types import Array

Residual = Callable[[nn.Module, Callable[[Array], Array], Array], Array]


def pre_norm(norm: nn.Module, sublayer: Callable[[Array], Array], x: Array) -> Array:
    """x + f(norm(x)), GPT-2 and everything since (Xiong et al. 2020, arXiv:2002.04745)."""
    return x + sublayer(norm(x))


def post_norm(norm: nn.Module, sublayer: Callable[[Array], Array], x: Array) -> Array:
    """norm(x + f(x)), the 2017 Transformer and GPT-1."""
    return norm(x + sublayer(x))


@dataclasses.dataclass(frozen=True)
class DeepNorm:
    """norm(alpha x + f(x)): post_norm with a wider residual (Wang et al. 2022, arXiv:2203.00555).

    It goes with `deep_norm_init`, and alpha = 1 is post_norm.
    """

    alpha: float

    def __call__(self, norm: nn.Module, sublayer: Callable[[Array], Array], x: Array) -> Array:
        return norm(self.alpha * x + sublayer(x))


def deep_norm(layers: int) -> DeepNorm:
    """For a decoder of `layers` layers: alpha = (2L)^(1/4) (arXiv:2203.00555, Figure 2)."""
    return DeepNorm((2 * layers) ** 0.25)


def deep_norm_init(layers: int) -> Rules:
    """Xavier with gain beta = (8L)^(-1/4) for ffn, v and o, with gain 1 for q and k (ibid.)."""
    beta = (8 * layers) ** -0.25
    scaled = r".*/(attention/(v|o)|ffn/\w+)/kernel"
    return ((scaled, Xavier(beta)), (r".*/attention/(q|k)/kernel", Xavier()))


@dataclasses.dataclass(frozen=True)
class NormedResidual:
    """alpha n + f(n) with n = norm(x): the residual stream carries what has been normalised.

    GLM-130B (arXiv:2210.02414) and ChatGLM-6B, alpha = (2L)^(1/2). It is DeepNorm with every norm
    counted to the sublayer that follows: norm(alpha n + f(n)) is the next one's n.
    """

    alpha: float

    def __call__(self, norm: nn.Module, sublayer: Callable[[Array], Array], x: Array) -> Array:
        normed = norm(x)
        return self.alpha * normed + sublayer(normed)


class Block(nn.Module):
    """One layer. `dropout` is the rate of what each sublayer adds to the residual stream."""

    attention: Attention
    ffn: nn.Module
    norm: nn.Module = RMSNorm()
    residual: Residual = pre_norm
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, inputs: Inputs, cache: LayerCache | None = None
    ) -> tuple[Array, LayerCache | None]:
        def attend(normed: Array) -> Array:
            nonlocal cache
            y, cache = self.attention(normed, inputs, cache)
            return dropout(self, y, self.dropout)

        def feed(normed: Array) -> Array:
            return dropout(self, self.ffn(normed), self.dropout)

        x = self.residual(self.norm.copy(name="attention_norm"), attend, x)
        x = self.residual(self.norm.copy(name="ffn_norm"), feed, x)
        return x, cache
