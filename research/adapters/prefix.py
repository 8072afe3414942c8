"""Prefix tuning: keys and values before the text, in every layer, are all that trains.

Li & Liang 2021 (arXiv:2101.00190). While it trains the prefix is made by an MLP of a `hidden`
width, embedding -> Linear -> tanh -> Linear, and `finish` keeps what came out of it. Without one the
keys and values are the parameters: P-tuning v2 (Liu et al. 2022, arXiv:2110.07602).

    prefix/table [P, 2 L K H]                    or, with an MLP,
    prefix/table [P, D'], prefix/{hidden,out}/{kernel,bias}

    model, params = prefix.add(model, params, rng, length=20, hidden=512)
    ...  # partition(params, prefix.TRAINABLE)
    params = prefix.finish(params)

A row of what they give has the key of layer l at part 2l and its value at 2l + 1 of 2L parts, the
layout of Hugging Face PEFT. No position is applied to a prefix's keys.

Differences and choices:
1. The text stands at positions P, P + 1, ... as in the paper's code and PEFT; `moves=False` leaves it
   at 0, 1, ... as ChatGLM's own P-tuning does. Either way P counts towards the context.
2. A sliding window never hides the prefix; in Hugging Face's caches it slides out of sight.
3. PEFT's table under an MLP is K H wide and its MLP D or as told; the paper's are D and 512.
4. ALiBi is refused: it measures distance in slots, and padding would move the prefix away.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.adapters.prefixed import Prefixed, flat, sizes
from research.models.decoder import Decoder, empty_cache
from research.models.init import Normal
from research.models.stack import layer
from research.types import Array, Params
from research.weights.base import row_count
from research.weights.prompt_encoder import linear

TRAINABLE = r"prefix/.*"


def add(
    model: Decoder,
    params: Params,
    rng: Array,
    length: int = 20,
    hidden: int | None = None,
    moves: bool = True,
    dropout: float = 0.0,
    std: float | None = None,
) -> tuple[Prefixed, Params]:
    """The model with a prefix of `length` before every row: (model, params), `prefix` float32.

    hidden: the MLP's width; None: no MLP. std: of the table, by default 1 under an MLP, 0.02 without.
    ValueError when the prefix leaves no room in the context, there is one already, or a layer
    cannot take one.
    """
    features = 2 * model.config.layers * require_fit(model, params, length)
    width = model.config.width
    table, first, second = jax.random.split(rng, 3)
    if hidden is None:
        prefix = {"table": Normal(0.02 if std is None else std)(table, (length, features))}
    else:
        prefix = {
            "table": Normal(1.0 if std is None else std)(table, (length, width)),
            "hidden": linear(first, width, hidden),
            "out": linear(second, hidden, features),
        }
    return Prefixed(model.config, length, moves, dropout), {**params, "prefix": prefix}


def add_text(model: Decoder, params: Params, tokens: Array) -> tuple[Prefixed, Params]:
    """A prefix that begins as the activations of real words [P] (section 7.4 of the paper): before
    it trains, the model is the base that has read them, windows apart. No MLP, no dropout.

    ValueError as of `add`, and for tokens that are no ids [P] of the vocabulary."""
    tokens = jnp.asarray(tokens)
    readable = row_count(params["embed"]["table"])
    if tokens.ndim != 1 or not tokens.size or tokens.min() < 0 or tokens.max() >= readable:
        raise ValueError(f"a prefix of words needs ids [P] in 0..{readable - 1}, not {tokens}")
    P = tokens.size
    require_fit(model, params, P)
    stacked = not any(isinstance(node, tuple) for node in params.values())
    cache = empty_cache(model, 1, P, jnp.float32, stacked)
    _, cache = model.apply({"params": params}, tokens[None], cache=cache, method="hidden")
    parts = [
        jnp.stack([held.keys[0], held.values[0]])
        for stack, layers in zip(model.config.stacks, cache.layers, strict=True)
        for index in range(stack.count)
        for held in (layer(layers, index)[f"block_{n}"] for n in range(len(stack.pattern)))
    ]
    table = jnp.moveaxis(jnp.stack(parts), 2, 0).reshape(P, -1)  # parts: [L, 2, P, K, H]
    return Prefixed(model.config, P), {**params, "prefix": {"table": table}}


def require_fit(model: Decoder, params: Params, length: int) -> int:
    """The features K H of one layer's keys; ValueError for what `add` refuses."""
    if not isinstance(model, Decoder):
        raise ValueError(f"a prefix needs a Decoder, not a {type(model).__name__}")
    if "prefix" in params:
        raise ValueError("the parameters have a prefix already: remove it first")
    if not 1 <= length < model.config.max_length:
        raise ValueError(
            f"a prefix of {length} does not fit the context of {model.config.max_length}: "
            f"expected 1..{model.config.max_length - 1}"
        )
    K, H = sizes(model.config)
    return K * H


def axes(params: Params) -> Params:
    """Logical axis names of the prefix, to stand beside those of `decoder.axes`."""
    names = {
        "table": (None, None),
        "hidden": {"kernel": (None, "ffn"), "bias": ("ffn",)},
        "out": {"kernel": ("ffn", None), "bias": (None,)},
    }
    return {"prefix": {name: names[name] for name in params["prefix"]}}


def finish(params: Params) -> Params:
    """The MLP dropped, what it made kept: the same function with the smaller prefix."""
    return {**params, "prefix": {"table": flat(params["prefix"])}}


def remove(model: Prefixed, params: Params) -> tuple[Decoder, Params]:
    """The base model and its parameters again."""
    return Decoder(model.config), {n: node for n, node in params.items() if n != "prefix"}
