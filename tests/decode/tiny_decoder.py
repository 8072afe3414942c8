"""A tiny random model whose every sequence can be scored one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from research.models import decoder
from research.models.attention import Attention
from research.models.layers import GatedMlp


def make(V, seed, scale=6.0, max_length=48):
    """(model, params, log_probs): the last gives log p [n, T, V] of rows of ids [n, T] by one
    forward pass without a cache."""
    block = decoder.Block(Attention(heads=2, kv_heads=1, head_size=8), GatedMlp(24))
    model = decoder.Decoder(decoder.DecoderConfig(V, 16, (decoder.Stack(2, (block,)),), max_length))
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(seed))
    params = jax.tree.map(lambda x: scale * x, params)

    @jax.jit
    def apply(tokens):
        return jax.nn.log_softmax(model.apply({"params": params}, tokens), axis=-1)

    def log_probs(rows):
        rows = np.asarray(rows, np.int32)
        padded = np.zeros((len(rows), max_length), np.int32)
        padded[:, : rows.shape[1]] = rows  # causal: what follows changes nothing
        return np.asarray(apply(jnp.asarray(padded))[:, : rows.shape[1]], np.float64)

    return model, params, log_probs


def every_sequence(log_probs, prompt, V, steps, stops=()):
    """{ids: Σ log p} of all continuations of `steps` tokens, or fewer that end with a stop id."""
    found = {}
    tails = list(itertools.product(range(V), repeat=steps))
    table = log_probs([[*prompt, *tail] for tail in tails])
    for tail, rows in zip(tails, table, strict=True):
        end = next((i + 1 for i, token in enumerate(tail) if token in stops), steps)
        at = len(prompt) - 1 + np.arange(end)
        found[tail[:end]] = rows[at, tail[:end]].sum()
    return found


def below_chi_square(counts, expected):
    """Whether the statistic is under the 1e-3 quantile; cells of fewer than 5 are put together."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    k = len(expected) - 1  # Wilson-Hilferty's approximation of the quantile
    limit = k * (1 - 2 / (9 * k) + 3.09 * (2 / (9 * k)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum() < limit
