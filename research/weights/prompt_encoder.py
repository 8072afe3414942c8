"""P-tuning: a prompt's rows come from a small trained network. Liu et al. 2021 (arXiv:2103.10385).

    Mlp     rows = MLP(E)                        E [P, D] trained, three layers with ReLU between
    Lstm    rows = MLP([LSTM→(E) ; LSTM←(E)])    two layers with ReLU between: the paper's eq. 4 and 5

The network ties the rows together while they are learned. Afterwards it has done its work, and
`prompt.finish` keeps the rows alone. Each function is an `initial` of `prompt.add`:

    prompt.add(params, rng, length=20, initial=partial(prompt_encoder.lstm, hidden=128))

Differences and choices:
1. Layers and initial values are those of Hugging Face PEFT's PromptEncoder (torch's: E ~ N(0, 1),
   the rest uniform). The paper's E is a lookup table of the same shape.
2. torch's LSTM has two biases that it always adds; here they are one, begun as their sum. An
   optimizer of normalised steps (Adam) therefore moves it half as fast.
3. The paper tunes the whole model as well: train `r".*"` for that; `prompt.TRAINABLE` is PEFT's choice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from research.types import Array
from research.weights.base import Call, Weight, dropped, take

Layer = dict[str, Array]  # kernel [in, out], bias [out]
Direction = dict[str, Array]  # input [in, 4H], recurrent [H, 4H], bias [4H]; gates i, f, g, o
_STREAM = 0x5054  # the keys of the dropout, apart from what the base draws


class Encoder:
    """What both have: an `embedding` [P, D], and `encode`, which gives the rows."""

    embedding: Array

    def encode(self, call: Call) -> Array:
        """The rows [P, D]."""
        raise NotImplementedError(f"{type(self).__name__} must say how its rows are computed")

    def axes(self, embed: str | None) -> Encoder:
        """The same node with every array replaced by its axis names; `embed` is that of D."""
        raise NotImplementedError(f"{type(self).__name__} must name the axes of its leaves")


def is_encoder(node: Any) -> bool:
    return isinstance(node, Encoder)


@struct.dataclass
class Mlp(Encoder):
    """embedding [P, D]; layers D -> hidden -> hidden -> D."""

    embedding: Array
    layers: list[Layer]

    def encode(self, call: Call) -> Array:
        return feed_forward(self.embedding, self.layers)

    def axes(self, embed: str | None) -> Mlp:
        first, middle, last = (embed, None), (None, None), (None, embed)
        return Mlp((None, embed), [layer_axes(names) for names in (first, middle, last)])


@struct.dataclass
class Lstm(Encoder):
    """embedding [P, D]; `recurrent` D -> 2H, 2H -> 2H, ..., read in both directions; then two
    layers 2H -> 2H -> D. In training, between two recurrent layers, entries are dropped."""

    embedding: Array
    recurrent: list[dict[str, Direction]]  # of each layer: forward, backward
    layers: list[Layer]
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def encode(self, call: Call) -> Array:
        x = self.embedding
        for number, both in enumerate(self.recurrent):
            if number and call.dropout is not None:
                key = jax.random.fold_in(call.dropout, _STREAM + number)
                x = dropped(x, self.dropout, Call(dropout=key))
            states = run(both["forward"], x), run(both["backward"], x[::-1])[::-1]
            x = jnp.concatenate(states, axis=-1)
        return feed_forward(x, self.layers)

    def axes(self, embed: str | None) -> Lstm:
        def direction(inner: str | None) -> dict[str, tuple]:
            return {"input": (inner, None), "recurrent": (None, None), "bias": (None,)}

        inner = (embed, *[None] * (len(self.recurrent) - 1))
        recurrent = [{"forward": direction(i), "backward": direction(i)} for i in inner]
        layers = [layer_axes((None, None)), layer_axes((None, embed))]
        return self.replace(embedding=(None, embed), recurrent=recurrent, layers=layers)


def feed_forward(x: Array, layers: list[Layer]) -> Array:
    """x [P, in] through linear layers with ReLU between them."""
    for number, layer in enumerate(layers):
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"] + layer["bias"]
    return x


def run(weights: Direction, x: Array) -> Array:
    """An LSTM over x [P, in], from zero: its states [P, H] (Hochreiter and Schmidhuber 1997, with
    the forget gate of Gers et al. 2000)."""

    def step(carry: tuple[Array, Array], read: Array) -> tuple[tuple[Array, Array], Array]:
        state, cell = carry
        i, f, g, o = jnp.split(read + state @ weights["recurrent"], 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        state = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (state, cell), state

    zero = jnp.zeros(weights["recurrent"].shape[0], x.dtype)
    return lax.scan(step, (zero, zero), x @ weights["input"] + weights["bias"])[1]


def layer_axes(names: tuple) -> dict[str, tuple]:
    return {"kernel": names, "bias": names[-1:]}


def mlp(table: Array | Weight, rng: Array, length: int, hidden: int | None = None) -> Mlp:
    """An untrained Mlp for the width D of `table`; hidden defaults to D."""
    D = width(table)
    hidden = positive("hidden", D if hidden is None else hidden)
    sizes, keys = (D, hidden, hidden, D), jax.random.split(rng, 4)
    layers = [linear(keys[i], sizes[i], sizes[i + 1]) for i in range(3)]
    return Mlp(jax.random.normal(keys[3], (length, D)), layers)


def lstm(
    table: Array | Weight,
    rng: Array,
    length: int,
    hidden: int | None = None,
    layers: int = 2,
    dropout: float = 0.0,
) -> Lstm:
    """An untrained Lstm of `layers` recurrent layers of H = `hidden` states in each direction.

    hidden defaults to D // 2, so that both directions together are as wide as the model.
    """
    D = width(table)
    H = positive("hidden", D // 2 if hidden is None else hidden)
    keys = jax.random.split(rng, 3)
    sizes = (D, *[2 * H] * (positive("layers", layers) - 1))
    recurrent = [
        {
            name: direction(jax.random.fold_in(keys[0], 2 * number + way), size, H)
            for way, name in enumerate(("forward", "backward"))
        }
        for number, size in enumerate(sizes)
    ]
    first, last = jax.random.split(keys[1])
    head = [linear(first, 2 * H, 2 * H), linear(last, 2 * H, D)]
    return Lstm(jax.random.normal(keys[2], (length, D)), recurrent, head, dropout)


def linear(key: Array, inner: int, outer: int) -> Layer:
    """Kernel and bias ~ U(-1/sqrt(in), 1/sqrt(in))."""
    left, right = jax.random.split(key)
    return {
        "kernel": uniform(left, (inner, outer), inner),
        "bias": uniform(right, (outer,), inner),
    }


def direction(key: Array, inner: int, hidden: int) -> Direction:
    """All ~ U(-1/sqrt(H), 1/sqrt(H)), the bias the sum of two such."""
    keys, gates = jax.random.split(key, 3), 4 * hidden
    return {
        "input": uniform(keys[0], (inner, gates), hidden),
        "recurrent": uniform(keys[1], (hidden, gates), hidden),
        "bias": uniform(keys[2], (2, gates), hidden).sum(0),
    }


def uniform(key: Array, shape: tuple, size: int) -> Array:
    return jax.random.uniform(key, shape, minval=-(size**-0.5), maxval=size**-0.5)


def width(table: Array | Weight) -> int:
    """D of a table [V, D]."""
    return jax.eval_shape(lambda w: take(w, jnp.zeros(1, jnp.int32)), table).shape[-1]


def positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"a prompt encoder needs {name} of at least 1, not {value}")
    return value
