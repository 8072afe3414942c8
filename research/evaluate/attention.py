"""Where a decoder's heads look: the weights themselves, and what is commonly read off them.

Every statistic takes weights [..., T, T], rows the tokens that look (queries), and is a mean over
the queries 1..T-1: the first token of a causal model sees itself alone, whatever the head does.

    entropy      −Σ_j w_ij ln w_ij, nats: 0 looks at one token, ln(i+1) at all alike
    distance     Σ_j w_ij |i − j|, tokens
    first        w_i0, the "sink" of Xiao et al. 2023 (arXiv:2309.17453)
    previous     w_i,i-1
    self         w_ii
    equal        on earlier tokens equal to token i
    induction    on tokens that stand right after an earlier one equal to token i (the prefix
                 matching of Olsson et al. 2022, arXiv:2209.11895)

The last two are means over the tokens that occurred before, nan where none did.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.kernels.attend import attention_weights, reference
from research.kernels.mask import Mask
from research.models.decoder import Decoder, DecoderConfig, init
from research.models.stack import Stack
from research.types import Array, Params
from research.weights.base import row_count


def capture(model: Decoder, params: Params, tokens: Array) -> tuple[Array, Array]:
    """(weights [L, N, T, T] float32, logits [T, V]) of one sequence of token ids [T].

    weights[l, n, i, j] is what head n of layer l gives to token j when token i looks; layers in the
    order in which they run. Any family, stacked or unstacked parameters. ValueError for tokens of
    another shape, for ids that the embedding has no row for, where layers differ in their number of
    heads, and for a layer that looks without the config's `attend` (LinearAttention;
    StreamingAttention with sinks).
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be ids [T], T > 0; got {tokens.dtype} {tokens.shape}")
    heads = [b.attention.heads for stack in model.config.stacks for b in stack.pattern]
    if len(set(heads)) > 1:
        raise ValueError(f"all layers must have the same number of heads; a cycle's have {heads}")
    ids = row_count(params["embed"]["table"])
    if tokens.min() < 0 or tokens.max() >= ids:
        raise ValueError(
            f"tokens must be in 0..{ids - 1}; they go from {tokens.min()} to {tokens.max()}"
        )
    return _capture(model, params, tokens)


@partial(jax.jit, static_argnames="model")
def _capture(model: Decoder, params: Params, tokens: Array) -> tuple[Array, Array]:
    found = []

    def attend(
        q: Array,
        k: Array,
        v: Array,
        mask: Mask,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Array:
        found.append(attention_weights(q, k, mask, scale, softcap)[0])
        return reference(q, k, v, mask, scale, softcap=softcap)

    # A scan would trace the closure once for all layers, remat keep its tracers to itself.
    config = dataclasses.replace(model.config, attend=attend, scan=False, remat=None)
    require_attend(config)
    logits = Decoder(config).apply({"params": params}, tokens[None])
    return jnp.stack(found), logits[0]


def require_attend(config: DecoderConfig) -> None:
    """ValueError naming the first layer whose attention does not call `attend`: each kind of block is
    traced alone, nothing is computed."""
    first = 0
    for stack in config.stacks:
        for number, block in enumerate(stack.pattern):
            if not calls_attend(config, block):
                raise ValueError(
                    f"layer {first + number}: {type(block.attention).__name__} does not look through "
                    "the config's `attend`, so its weights cannot be captured"
                )
        first += stack.count * len(stack.pattern)


def calls_attend(config: DecoderConfig, block: Any) -> bool:
    called = []

    def attend(*arguments: Any, softcap: float | None = None) -> Array:
        called.append(True)
        return reference(*arguments, softcap=softcap)

    alone = Decoder(dataclasses.replace(config, stacks=(Stack(1, (block,)),), attend=attend))
    params = jax.eval_shape(partial(init, alone), jax.random.key(0))
    tokens = jnp.zeros((1, 1), jnp.int32)
    jax.eval_shape(lambda params: alone.apply({"params": params}, tokens), params)
    return bool(called)


def mean_entropy(weights: Array) -> Array:
    """[..., T, T] -> [...], nats."""
    safe = jnp.where(weights > 0, weights, 1)
    return _over_queries(-(weights * jnp.log(safe)).sum(-1))


def mean_distance(weights: Array) -> Array:
    """[..., T, T] -> [...], tokens."""
    index = jnp.arange(weights.shape[-1])
    return share(weights, jnp.abs(index[:, None] - index))


def share(weights: Array, of: Array) -> Array:
    """[..., T, T] -> [...]: the weight on what `of` [T, T] marks with 1, a mean over queries."""
    return _over_queries((weights * of).sum(-1))


def _over_queries(values: Array) -> Array:
    if values.shape[-1] < 2:
        raise ValueError("statistics of attention need two tokens or more")
    return values[..., 1:].mean(-1)


def share_of_matches(weights: Array, tokens: Array, after: int) -> Array:
    """[..., T, T] -> [...]: the weight on positions `after` behind an earlier equal token.

    after=0 gives `equal` above, after=1 `induction`: of tokens A B ... A, the last A's weight on
    the first A, and on B. nan when no token occurs twice.
    """
    T = tokens.shape[0]
    earlier = (tokens[:, None] == tokens) & jnp.tri(T, k=-1, dtype=bool)
    marked = jnp.roll(earlier, after, axis=1).at[:, :after].set(False)
    repeats = earlier.any(-1)
    return ((weights * marked).sum(-1) * repeats).sum(-1) / repeats.sum()


def statistics(weights: Array, tokens: Array) -> dict[str, Array]:
    """{name: [L, N]} of the table above for weights [L, N, T, T] and token ids [T]."""
    T = weights.shape[-1]
    tokens = jnp.asarray(tokens)
    if tokens.shape != (T,):
        raise ValueError(f"weights of {T} tokens need token ids [{T}], not {tokens.shape}")
    first = jnp.zeros((T, T)).at[:, 0].set(1)
    return {
        "entropy": mean_entropy(weights),
        "distance": mean_distance(weights),
        "first": share(weights, first),
        "previous": share(weights, jnp.eye(T, k=-1)),
        "self": share(weights, jnp.eye(T)),
        "equal": share_of_matches(weights, tokens, 0),
        "induction": share_of_matches(weights, tokens, 1),
    }


def rollout(weights: Array) -> Array:
    """[L, N, T, T] -> [L, T, T]: attention through all layers up to each, residuals counted.

    R_l = A_l R_(l-1), R_0 = I, where A = (W + I) / 2 with rows made to sum to 1 and W the mean over
    heads. Abnar & Zuidema 2020, section 3.1 (arXiv:2005.00928).
    """
    identity = jnp.eye(weights.shape[-1])
    layers = (weights.mean(1) + identity) / 2
    layers = layers / layers.sum(-1, keepdims=True)

    def step(below: Array, layer: Array) -> tuple[Array, Array]:
        through = jnp.matmul(layer, below, precision=jax.lax.Precision.HIGHEST)
        return through, through

    return jax.lax.scan(step, identity, layers)[1]
