"""Optimizers from frozen-dataclass configs, with rates, decay and freezing by path.

    AdamW      Loshchilov & Hutter 2019 (arXiv:1711.05101)
    AdamW8bit  the same with moments of 8 bits: `adam8bit`
    Adafactor  Shazeer & Stern 2018 (arXiv:1804.04235)
    Lion       Chen et al. 2023 (arXiv:2302.06675)
    SGD        with momentum

All have the form of torch's AdamW: p <- p - lr * (direction + weight_decay * p), the decay never
passing through the moments. State is float32 whatever the parameters are, or 8-bit codes.

Differs from the papers: Adafactor's factors and its clipping see a stacked leaf [L, in, out] as one
block (the factored axes are still `in` and `out` when both are longer than L), and its rate is the
schedule's, relative to the root mean square of the parameters only when `relative` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.paths import assign, map_named, named_leaves
from research.train.adam8bit import scale_by_adam8bit
from research.train.paged import paged
from research.train.schedules import Schedule
from research.types import Array, Params, PyTree

# Norm scales and biases do not decay; matrices, tables and their factors do.
DECAY = ((r"(.*/)?(scale|bias)", False), (r".*", True))


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share.

    lr            a number or a schedule
    weight_decay  decoupled, multiplied by lr
    clip_norm     largest global norm of the gradient; None does not clip
    rates         (regex, multiplier of lr) pairs covering every path; a multiplier may be a vector
                  [L] over the leading axis of a stacked leaf, a function from the step to either
                  (`depth.Unfreezing`), or None, which freezes the leaf
    decay         (regex, multiplier of weight_decay or bool) pairs covering every path; None is
                  `DECAY`, whose expressions need not all match
    """

    lr: float | Schedule = 1e-3
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    rates: tuple[tuple[str, Any], ...] = ((r".*", 1.0),)
    decay: tuple[tuple[str, float | bool], ...] | None = None

    def direction(self) -> optax.GradientTransformation:
        """Gradient -> direction of descent, before decay and rate."""
        raise NotImplementedError(f"{type(self).__name__} must say which way it steps")


@dataclass(frozen=True)
class AdamW(Optimizer):
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True)
class AdamW8bit(AdamW):
    """Leaves of fewer than `min_size` numbers keep float32 moments."""

    min_size: int = 4096

    def direction(self) -> optax.GradientTransformation:
        return scale_by_adam8bit(self.b1, self.b2, self.eps, self.min_size)


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """`decay_exponent` is the paper's c in beta2_t = 1 - t^-c; `momentum` None keeps no first moment."""

    decay_exponent: float = 0.8
    eps: float = 1e-30
    clip_block_rms: float = 1.0
    relative: bool = False
    momentum: float | None = None
    factored_from: int = 128

    def direction(self) -> optax.GradientTransformation:
        parts = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_exponent,
                epsilon=self.eps,
                min_dim_size_to_factor=self.factored_from,
            ),
            optax.clip_by_block_rms(self.clip_block_rms),
        ]
        if self.relative:
            parts.append(optax.scale_by_param_block_rms())
        if self.momentum is not None:
            parts.append(optax.ema(self.momentum, debias=False))
        return optax.chain(*parts)


@dataclass(frozen=True)
class Lion(Optimizer):
    lr: float | Schedule = 1e-4
    b1: float = 0.9
    b2: float = 0.99

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True)
class SGD(Optimizer):
    momentum: float = 0.0

    def direction(self) -> optax.GradientTransformation:
        return optax.trace(self.momentum) if self.momentum else optax.identity()


@dataclass(frozen=True)
class Finished:
    """An optimizer, and what has the last word on its updates.

    finish(trainable) gives an optax transformation. Its updates are those that would be added to
    the parameters, rates and decay included; its extra arguments are those of the training step,
    `grad` (before clipping) among them. Where a method's own config can be called so, it is one.
    """

    optimizer: Optimizer
    finish: Callable[[Params], optax.GradientTransformation]


@dataclass(frozen=True)
class Paged:
    """An optimizer whose state is kept in the host's memory between steps: `paged`."""

    optimizer: Optimizer | Finished
    min_size: int = 4096


Config = Optimizer | Finished | Paged


class RateState(NamedTuple):
    """Where the training step reads the rate that was used."""

    count: Array
    learning_rate: Array


def optimizer(config: Config, trainable: Params) -> optax.GradientTransformationExtraArgs:
    """The optax transformation of `config` for a tree of trainable leaves (holes are `None`).

    Raises RuleError when a path rule matches nothing or a path is not covered, ValueError when a
    vector rate does not fit its leaf.
    """
    if isinstance(config, Paged):
        return paged(optimizer(config.optimizer, trainable), config.min_size)
    if isinstance(config, Finished):
        return optax.chain(optimizer(config.optimizer, trainable), config.finish(trainable))
    names = [name for name, _ in named_leaves(trainable)]
    rates = assign(config.rates, names)
    decays = _decays(config, names)
    multipliers = {
        name: _multiplier(name, rates[name], leaf)
        for name, leaf in named_leaves(trainable)
        if rates[name] is not None
    }
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts += [
        config.direction(),
        _add_decay({name: config.weight_decay * float(share) for name, share in decays.items()}),
        _scale_by_rate(config.lr, multipliers),
    ]
    return _only(set(multipliers), _in_float32(optax.chain(*parts)))


def _decays(config: Optimizer, names: list[str]) -> dict[str, float | bool]:
    if config.decay is not None:
        return assign(config.decay, names)
    exceptions = [name for name in names if name.rsplit("/", 1)[-1] in ("scale", "bias")]
    rules = DECAY if exceptions else DECAY[1:]
    return assign(rules if len(exceptions) < len(names) else DECAY[:1], names)


Multiplier = float | np.ndarray | Callable[[Array], Array]


def _multiplier(name: str, rate: Any, leaf: Array) -> Multiplier:
    """A number, a vector [L] shaped [L, 1, ...] to meet its leaf, or a function from the step to one."""
    if callable(rate):
        shape = _fitting(name, jax.eval_shape(rate, jnp.int32(0)), leaf)
        return lambda step: jnp.reshape(rate(step), shape)
    if np.ndim(rate) == 0:
        return float(rate)
    vector = np.asarray(rate, np.float32)
    return vector.reshape(_fitting(name, vector, leaf))


def _fitting(name: str, vector: Any, leaf: Array) -> tuple[int, ...]:
    """The shape in which a number or a vector [L] meets its leaf."""
    if vector.ndim == 0:
        return ()
    if vector.ndim != 1 or leaf.ndim == 0 or leaf.shape[0] != vector.shape[0]:
        raise ValueError(
            f"rate of {name}: a vector of shape {vector.shape} does not fit a leaf of shape "
            f"{leaf.shape}; expected one rate for each entry of the leading axis"
        )
    return (vector.shape[0], *[1] * (leaf.ndim - 1))


def _add_decay(weights: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        def decay(name, update, param):
            return update + weights[name] * param if weights[name] else update

        return map_named(decay, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_rate(
    lr: float | Schedule, multipliers: Mapping[str, Multiplier]
) -> optax.GradientTransformation:
    def rate_at(count: Array) -> Array:
        return jnp.asarray(lr(count) if callable(lr) else lr, jnp.float32)

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return RateState(count, rate_at(count))

    def update(updates, state, params=None):
        rate = rate_at(state.count)

        def scale(name: str, update: Array) -> Array:
            share = multipliers[name]
            return -rate * (share(state.count) if callable(share) else share) * update

        return map_named(scale, updates), RateState(state.count + 1, rate)

    return optax.GradientTransformation(init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)

    def cast(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(updates, state, params=None, **extra):
        return inner.update(cast(updates), state, cast(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(cast(params)), update)


def _only(
    names: set[str], inner: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """`inner` on the named leaves; the others have no state and an update of zero. ValueError when it begins
    with a tree that lacks one of them."""

    def hole(tree: PyTree) -> PyTree:
        return map_named(lambda name, leaf: leaf if name in names else None, tree)

    def update(updates, state, params=None, **extra):
        moved, state = inner.update(hole(updates), state, hole(params), **extra)
        arrived = dict(named_leaves(moved))
        return map_named(lambda name, leaf: arrived.get(name, jnp.zeros_like(leaf)), updates), state

    def init(params):
        if missing := names - {name for name, _ in named_leaves(params)}:
            raise ValueError(
                f"optimizer: made for a tree with a leaf {min(missing)!r}, which this one does not have"
            )
        return inner.init(hole(params))

    return optax.GradientTransformationExtraArgs(init, update)
