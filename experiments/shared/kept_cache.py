"""What a key/value cache in few bits costs and saves, measured on a decoder.

    model = with_storage(base.model, keys, values)
    compare(base.model, model, params, windows)     # the text read through the cache, and without one
    bytes_per_token(model), seconds_per_token(model, layers, context, count)

A text is read at once: what a slot keeps depends on its token alone, so that one by one is the same.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from research.evaluate import quantization
from research.models import decoder
from research.models.attention import Cache
from research.models.decoder import Decoder
from research.models.storage import Storage, stored
from research.types import Array, Params
from research.weights.formats import Format, rounded


def with_storage(model: Decoder, keys: Format | None, values: Format | None) -> Decoder:
    return model.clone(config=stored(model.config, Storage(keys, values)))


def compare(
    model: Decoder, cached: Decoder, params: Params, windows: np.ndarray
) -> quantization.Comparison:
    """Windows [n, T] without a cache, and read through that of `cached`; ValueError without a window of
    two tokens."""
    quantization.require_windows(windows, 2)
    sums = [_means(model, cached, params, jnp.asarray(window[None])) for window in windows]
    return quantization.Comparison(*np.asarray(jax.device_get(sums), np.float64).T)


@partial(jax.jit, static_argnums=(0, 1))
def _means(model: Decoder, cached: Decoder, params: Params, tokens: Array) -> Array:
    """[4] in the order of `Comparison`, of one window [1, T]; its logits exist at once."""
    before = model.apply({"params": params}, tokens[:, :-1])
    after, _ = read_through(cached, params, tokens[:, :-1])
    p, q = (jax.nn.log_softmax(logits, axis=-1) for logits in (before, after))
    own = [-jnp.take_along_axis(x, tokens[:, 1:, None], axis=-1)[..., 0] for x in (p, q)]
    same = (p.argmax(-1) == q.argmax(-1)).astype(jnp.float32)
    return jnp.stack([(jnp.exp(p) * (p - q)).sum(-1), *own, same]).mean(axis=(1, 2))


def read_through(model: Decoder, params: Params, tokens: Array) -> tuple[Array, Cache]:
    """Logits [B, T, V] of tokens [B, T] that attend to what an empty cache gives back of them."""
    empty = decoder.empty_cache(model, *tokens.shape)
    return model.apply({"params": params}, tokens, cache=empty)


@partial(jax.jit, static_argnums=0)
def keys_and_values(model: Decoder, params: Params, tokens: Array) -> tuple[Array, Array]:
    """[L, B, T, K, H] each, as a cache that rounds nothing keeps them."""
    layer = read_through(model, params, tokens)[1].layers[0]["block_0"]
    return layer.keys, layer.values


def errors(x: Array, format: Format | None) -> tuple[float, float]:
    """Relative errors of x [L, B, T, K, H] with scales a token along H, and a channel along T.

    Of the T tokens only as many are looked at as whole groups of them hold.
    """
    if format is None:
        return 0.0, 0.0
    group = format.group if isinstance(format.group, int) else 1
    x = x[:, :, : x.shape[2] // group * group]
    channels = jnp.moveaxis(x, 2, -1)
    pairs = (x, rounded(x, format)), (channels, rounded(channels, format))
    return tuple(float(quantization.relative_error(*pair, axis=None)) for pair in pairs)


def channel_outliers(x: Array) -> float:
    """Largest over median channel of x [L, B, T, K, H] by its largest magnitude; the median of all
    layers and heads."""
    return float(np.median(quantization.outliers(jnp.abs(x).max(axis=(1, 2)))))


def bytes_per_token(model: Decoder, slots: int = 64) -> float:
    """Of the arrays of all layers of a cache of one row."""
    layers = jax.eval_shape(lambda: decoder.empty_cache(model, 1, slots)).layers
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers)) / slots


def seconds_per_token(model: Decoder, layers: Params, context: int, count: int) -> float:
    """The median of `count` single tokens behind `context` filled slots; `layers` of `for_decoding`.

    The slots hold zeros: what they hold changes no operation.
    """
    slots = context + count + 1
    cache = decoder.empty_cache(model, 1, slots, stacked=False).replace(
        segment_ids=(jnp.arange(slots) < context).astype(jnp.int32)[None],
        index=jnp.int32(context),
        lengths=jnp.full(1, context, jnp.int32),
    )
    token, took = jnp.zeros((1, 1), jnp.int32), []
    for _ in range(1 + count):
        started = time.perf_counter()
        token, cache = jax.block_until_ready(_next(model, layers, token, cache))
        took.append(time.perf_counter() - started)
    return statistics.median(took[1:])


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _next(model: Decoder, params: Params, token: Array, cache: Cache) -> tuple[Array, Cache]:
    logits, cache = model.apply({"params": params}, token, cache=cache)
    return logits.argmax(axis=-1).astype(jnp.int32), cache
