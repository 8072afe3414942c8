"""Channels that can be rescaled without a change of function: what writes them over s, what reads them
times s.

    attention_norm                -> attention/q, k, v
    ffn_norm                      -> ffn/up, and ffn/gate where there is one
    attention/v                   -> attention/o        where each query head has its own values
    ffn/up                        -> ffn/down           where the ffn is gated

A norm's scale and bias are divided, and a matrix's columns and bias; the rows of the readers are
multiplied. Their own biases stay. What is rescaled is exact only where nothing else reads the channels,
so the model says which they are: a norm after the residual sum, or one whose output is the residual
stream, looks the same in the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from research.models.attention import Attention
from research.models.block import Block, pre_norm
from research.models.layers import GatedMlp, Mlp
from research.models.linear_attention import LinearAttention
from research.models.stack import layers_of
from research.paths import map_named, named_leaves
from research.types import Array, Params
from research.weights.base import is_weight
from research.weights.quantized import require_dense

READERS = {
    "attention_norm": ("attention/q", "attention/k", "attention/v"),
    "ffn_norm": ("ffn/up", "ffn/gate"),
    "attention/v": ("attention/o",),
    "ffn/up": ("ffn/down",),
}
NORMS = ("attention_norm", "ffn_norm")

# The matrices whose inputs are those of all readers of a norm, and of all readers of anything.
NORM_INPUTS = r".*/(attention/q|ffn/up)/kernel"
INPUTS = r".*/(attention/(q|o)|ffn/(up|down))/kernel"


@dataclass(frozen=True)
class Pair:
    """source: what writes, 'stack_0/block_0/ffn_norm'. written: its leaves [L, (in,) D]. readers: the
    kernels [L, D, out] that multiply what was written; `key` names their input in statistics."""

    source: str
    written: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.readers[0]


def norm_pairs(model: Any, params: Params) -> list[Pair]:
    """Each norm and the matrices that read it, in the order of the layers.

    ValueError, naming the path, for a block in which something else may read the norm too (a norm
    after the sum, adapters, an encoder's states), and for a matrix that is a Weight.
    """
    return _pairs(model, params, NORMS)


def all_pairs(model: Any, params: Params) -> list[Pair]:
    """`norm_pairs`, and the matrices whose outputs another one reads channel by channel: v where heads
    share none, up where it is gated. Errors as there."""
    return _pairs(model, params, tuple(READERS))


def _pairs(model: Any, params: Params, sources: tuple[str, ...]) -> list[Pair]:
    if not hasattr(model.config, "stacks") or hasattr(model.config, "encoder"):
        raise ValueError(f"rescaling is for decoders, not {type(model).__name__}")
    leaves = dict(named_leaves(params, is_leaf=is_weight))
    found = []
    for path, _, _, block in layers_of(model.config.stacks):
        require_plain(path, block)
        found += [_pair(path, source, leaves) for source in sources if _stands(source, block)]
    return found


def require_plain(path: str, block: Any) -> None:
    """ValueError naming the norm or the part at whose channels something else looks."""
    if type(block) is not Block:
        raise ValueError(
            f"{path} is a {type(block).__name__}: rescaling knows a Block's norms only"
        )
    if block.residual is not pre_norm:
        raise ValueError(
            f"{path}/attention_norm: rescaling needs a norm that its sublayer alone reads (pre_norm), "
            f"not {block.residual}"
        )
    for name, kinds in (("attention", (Attention, LinearAttention)), ("ffn", (Mlp, GatedMlp))):
        part = getattr(block, name)
        if not isinstance(part, kinds):
            raise ValueError(
                f"{path}/{name} is a {type(part).__name__}, and what in it reads "
                f"{path}/{name}_norm is not known: rescale before adapters are added"
            )


def _stands(source: str, block: Block) -> bool:
    if source == "attention/v":
        return block.attention.heads == block.attention.kv_heads
    return source in NORMS or isinstance(block.ffn, GatedMlp)


def _pair(path: str, source: str, leaves: Mapping[str, Any]) -> Pair:
    """The pair of those of its leaves that there are, each looked at."""
    kind = "scale" if source in NORMS else "kernel"
    written = [f"{path}/{source}/{name}" for name in (kind, "bias")]
    readers = [f"{path}/{name}/kernel" for name in READERS[source]]
    if source == "ffn_norm" and readers[1] not in leaves:
        del readers[1]
    for name in [written[0], *readers]:
        if name not in leaves:
            raise ValueError(f"the model has {path}/{source}, but the parameters no {name}")
        if name.endswith("/kernel"):
            require_dense("rescaling", name, leaves[name])
    return Pair(f"{path}/{source}", tuple(n for n in written if n in leaves), tuple(readers))


def leaf(params: Params, path: str) -> Any:
    """What stands at 'a/b/c'."""
    for name in path.split("/"):
        params = params[name]
    return params


def rescale(params: Params, pair: Pair, s: Array) -> Params:
    """The same function with the pair's channels over s [L, D] where they are written."""

    def scaled(name: str, w: Any) -> Any:
        if name in pair.readers:
            return (w * s[..., :, None]).astype(w.dtype)
        if name in pair.written:
            return (w / (s[..., None, :] if w.ndim > s.ndim else s)).astype(w.dtype)
        return w

    return map_named(scaled, params, is_leaf=is_weight)


def statistic(statistics: Mapping[str, Any], name: str) -> Any:
    """What was measured of the inputs of the matrix at `name`; ValueError when nothing was."""
    if name not in statistics:
        raise ValueError(
            f"the statistics say nothing of the inputs of {name}; they have {sorted(statistics)}"
        )
    return statistics[name]


def inject_outliers(model: Any, params: Params, channels: list[int], factor: float) -> Params:
    """The same function whose norms write `channels` `factor` times larger: what smoothing undoes.

    Large models have such channels of their own (Dettmers et al. 2022, arXiv:2208.07339); here they are
    the same in every layer. ValueError for a channel that is not there and a factor of 0.
    """
    for pair in norm_pairs(model, params):
        layers, width = leaf(params, pair.written[0]).shape
        if factor == 0 or not all(0 <= channel < width for channel in channels):
            raise ValueError(
                f"outliers need a factor other than 0 and channels below {width}, "
                f"not {factor} and {channels}"
            )
        s = jnp.ones((layers, width)).at[:, jnp.asarray(channels)].set(1 / factor)
        params = rescale(params, pair, s)
    return params
