"""Bottleneck adapters: two thin layers with a nonlinearity, put behind or beside a sublayer.

    a(x) = f(x W_down + b_down) W_up + b_up,     W_down [D, R], W_up [R, D]

    serial      y -> y + a(y)                  behind: y is what the sublayer gives
    parallel    y -> y + scale * a(x)          beside: x is what the sublayer was given

    houlsby     serial behind attention and ffn, Houlsby et al. 2019 (arXiv:1902.00751)
    pfeiffer    serial behind ffn alone, Pfeiffer et al. 2020 (arXiv:2005.00247)
    parallel    beside ffn, He et al. 2021 (arXiv:2110.04366), scale 4

An adapter of width D and size R has 2 D R + D + R parameters. It stands inside the residual
connection: its result is added to the stream, or normed with it, as the sublayer's was.

Differences and choices:
1. Only the adapters train (`TRAINABLE`); Houlsby et al. train the norms too: `WITH_NORMS`.
2. Pfeiffer et al. add and norm before the adapter and once more after it; a pre-norm block has no
   norm there, and none is put in.
3. In a pre-norm block x of the parallel form is the normed input, which the sublayer reads too.
4. Behind attention and ffn W_down and W_up begin as a normal of 0.01 cut off at two standard
   deviations, and nearly nothing changes; beside ffn W_up = 0, and nothing changes at all.

An insertion changes the parts of the config, so a model with adapters is another model. All paths
stay where they were, and each sublayer has `adapter/{down,up}/{kernel,bias}` besides. An adapter
cannot be merged into a matrix: `hub.save` refuses the model, naming the adapter's parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models.decoder import Decoder
from research.models.init import Init
from research.models.layers import Linear
from research.models.stack import Stack
from research.types import Array, Params

TRAINABLE = r".*/(attention|ffn)/adapter/(down|up)/.*"
WITH_NORMS = rf"{TRAINABLE}|(.*/)?\w+_norm/(scale|bias)"
NEARLY_ZERO = nn.initializers.truncated_normal(1e-2)
# He et al. 2015 as torch's layers have it: U(-1/sqrt(in), 1/sqrt(in)).
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Bottleneck(nn.Module):
    """x [..., D] -> [..., D] through `size` features; without a residual connection of its own."""

    size: int
    activation: Callable[[Array], Array] = nn.silu
    down_init: Init = NEARLY_ZERO
    up_init: Init = NEARLY_ZERO

    @nn.compact
    def __call__(self, x: Array) -> Array:
        down = Linear(self.size, ("embed", "rank"), True, self.down_init, name="down")(x)
        up = Linear(x.shape[-1], ("rank", "embed"), True, self.up_init, name="up")
        return up(self.activation(down))


class Inserted(nn.Module):
    """A sublayer, attention or ffn, with a bottleneck; its parameters stay at the sublayer's own
    path. It is called as the sublayer is; a result's first part is the states, what else comes back
    (a cache) passes by. What is asked of the sublayer (`head_size`, `bias`, ...) it answers.
    """

    inner: nn.Module
    bottleneck: Bottleneck

    def setup(self):
        nn.share_scope(self, self.inner)

    @nn.compact
    def __call__(self, x: Array, *args: Any, **more: Any) -> Any:
        result = self.inner(x, *args, **more)
        y, *rest = result if isinstance(result, tuple) else (result,)
        y = self.joined(x, y, self.bottleneck.copy(name="adapter"))
        return (y, *rest) if isinstance(result, tuple) else y

    def joined(self, x: Array, y: Array, adapter: Bottleneck) -> Array:
        """From the sublayer's input and result, [B, T, D] each."""
        raise NotImplementedError(f"{type(self).__name__} must say where its bottleneck stands")

    def empty_cache(self, *args: Any) -> Any:
        return self.inner.empty_cache(*args)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner")
        if name in getattr(inner, "__dataclass_fields__", ()):
            return getattr(inner, name)
        return super().__getattr__(name)


class Serial(Inserted):
    """y + a(y)."""

    def joined(self, x: Array, y: Array, adapter: Bottleneck) -> Array:
        return y + adapter(y)


class Parallel(Inserted):
    """y + scale * a(x)."""

    scale: float = 4.0

    def joined(self, x: Array, y: Array, adapter: Bottleneck) -> Array:
        return y + self.scale * adapter(x)


def houlsby(
    model: Decoder,
    params: Params,
    rng: Array,
    size: int = 64,
    activation: Callable[[Array], Array] = nn.silu,
) -> tuple[Decoder, Params]:
    """The model with an adapter behind attention and ffn of every layer, and its parameters."""
    bottleneck = Bottleneck(size, activation)
    return add(model, params, rng, lambda inner: Serial(inner, bottleneck), ("attention", "ffn"))


def pfeiffer(
    model: Decoder,
    params: Params,
    rng: Array,
    size: int = 64,
    activation: Callable[[Array], Array] = nn.relu,
) -> tuple[Decoder, Params]:
    """The model with an adapter behind every layer's ffn, and its parameters."""
    bottleneck = Bottleneck(size, activation)
    return add(model, params, rng, lambda inner: Serial(inner, bottleneck), ("ffn",))


def parallel(
    model: Decoder,
    params: Params,
    rng: Array,
    size: int = 512,
    activation: Callable[[Array], Array] = nn.relu,
    scale: float = 4.0,
    at: Sequence[str] = ("ffn",),
) -> tuple[Decoder, Params]:
    """The model with an adapter beside every layer's ffn, and its parameters.

    size 512 and scale 4 are the paper's for the ffn. `at` may name attention too.
    """
    bottleneck = Bottleneck(size, activation, UNIFORM, nn.initializers.zeros)
    return add(model, params, rng, lambda inner: Parallel(inner, bottleneck, scale), at)


def add(
    model: Decoder,
    params: Params,
    rng: Array,
    insert: Callable[[nn.Module], Inserted],
    at: Sequence[str],
) -> tuple[Decoder, Params]:
    """`insert` around the sublayers `at` ("attention", "ffn") of every block: (model, params).

    The adapters' parameters are float32. ValueError for a size below 1, other sublayers, a model
    that has adapters already, and parameters that are not stacked.
    """
    if not at or set(at) - {"attention", "ffn"}:
        raise ValueError(f"adapters stand at 'attention' or 'ffn', not at {tuple(at)}")

    def around(inner: nn.Module) -> Inserted:
        if isinstance(inner, Inserted):
            raise ValueError("the model has adapters already: remove them first")
        return insert(inner)

    changed = with_sublayers(model, around, at)
    params = dict(params)
    for number, stack in enumerate(changed.config.stacks):
        name, key = f"stack_{number}", jax.random.fold_in(rng, number)
        if isinstance(params[name], tuple):
            raise ValueError(f"{name} is one tree per layer: adapters are put into stacked ones")
        params[name] = with_adapters(params[name], stack, key, model.config.width, at)
    return changed, params


def with_adapters(
    blocks: Params, stack: Stack, rng: Array, width: int, at: Sequence[str]
) -> Params:
    """The parameters of a stack, {block_0: ...}, with fresh ones for the adapters of its blocks."""
    blocks, x = dict(blocks), jnp.zeros((1, 1, width))
    for number, block in enumerate(stack.pattern):
        name = f"block_{number}"
        for place, sublayer in enumerate(at):
            bottleneck = getattr(block, sublayer).bottleneck
            if bottleneck.size < 1:
                raise ValueError(f"an adapter needs a size of at least 1, not {bottleneck.size}")
            keys = jax.random.fold_in(jax.random.fold_in(rng, number), place)
            boxed = jax.vmap(bottleneck.init, (0, None))(jax.random.split(keys, stack.count), x)
            fresh = nn.meta.unbox(boxed["params"])
            blocks[name] = {
                **blocks[name],
                sublayer: {**blocks[name][sublayer], "adapter": fresh},
            }
    return blocks


def remove(model: Decoder, params: Params) -> tuple[Decoder, Params]:
    """The base model and its parameters again, the adapters forgotten; layers may be apart."""

    def without(tree: Any) -> Any:
        if isinstance(tree, tuple):
            return tuple(map(without, tree))
        if not isinstance(tree, dict):
            return tree
        return {name: without(node) for name, node in tree.items() if name != "adapter"}

    def inside(sublayer: nn.Module) -> nn.Module:
        return sublayer.inner if isinstance(sublayer, Inserted) else sublayer

    return with_sublayers(model, inside, ("attention", "ffn")), without(params)


def with_sublayers(
    model: Decoder, change: Callable[[nn.Module], nn.Module], at: Sequence[str]
) -> Decoder:
    """The model whose every block has `change` of its sublayers `at`."""

    def of(stack: Stack) -> Stack:
        blocks = (b.clone(**{name: change(getattr(b, name)) for name in at}) for b in stack.pattern)
        return dataclasses.replace(stack, pattern=tuple(blocks))

    stacks = tuple(map(of, model.config.stacks))
    return model.clone(config=dataclasses.replace(model.config, stacks=stacks))
