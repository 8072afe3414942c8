"""Layer-by-layer distillation: a quantized layer trained until its output is the full layer's again.

ZeroQuant's LKD (Yao et al. 2022, arXiv:2206.01861), from below, one layer after another:

    minimise  mean over tokens of |L̂(x̂) - L(x)|² / |L(x)|²   over the matrices of L̂

L is the full layer, x what it reads in the full model, L̂ the layer with weights in groups of few bits
and inputs rounded token by token (`formats`, `int8`), and x̂ what it reads in the quantized model, whose
lower layers are trained already. The gradient passes the roundings unchanged (`fake`). No label is
needed, no other layer is in memory, and all layers of one path share one compiled step.

    made = distill.quantize(model, params, windows, Integer(4, 64))
    made.params                          # `QuantizedInputs` around `Quantized`
    made.before, made.after              # the error of each layer

Differences and choices:
1. The target is the full layer's output on the full model's states, so that a layer also makes good
   what the layers below have lost, and its error is how far the quantized model's states are from the
   full one's. On the same states for both it would only learn its own roundings, and the errors of all
   layers would add up.
2. In the paper both layers read the full model's states, x̂ = x: `reads_full`. Then no layer knows of
   the errors below it.
3. Each layer ends with the better of its matrices before and after training, by the error over all
   calibration windows. So none ends worse than by rounding to nearest, where the layers below it
   are the same.
4. A token's error is relative to its own state (`relative`), the paper's is not (`squared`). In many
   models the first token's state is so large (Sun et al. 2024, arXiv:2402.17762; 0.98 of the sum of
   squares behind layer 11 of SmolLM2, counted from 0) that the plain error is about this token alone.
5. Only the rounded matrices train. Their scales are those of the matrices as they are at every step;
   norms and biases stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.models.attention import Inputs
from research.models.decoder import Decoder
from research.paths import named_leaves
from research.quantize import layerwise
from research.quantize.layerwise import Layer, Progress, States
from research.train import optim
from research.train.partition import combine, partition
from research.types import Array, Params
from research.weights import fake, int8
from research.weights.formats import Format

Distance = Callable[[Array, Array], Array]  # (outputs, targets) [B, T, D] -> [B, T]

MATRICES = r"stack_\d+/.*/kernel"
OPTIMIZER = optim.AdamW(1e-4, weight_decay=0.0, clip_norm=None)


def relative(y: Array, target: Array) -> Array:
    """|y - target|² / |target|² of each token."""
    return squared(y, target) / squared(jnp.zeros_like(target), target)


def squared(y: Array, target: Array) -> Array:
    """The mean of (y - target)² of each token."""
    return jnp.square(y.astype(jnp.float32) - target.astype(jnp.float32)).mean(axis=-1)


class Distilled(NamedTuple):
    """Params in few bits; the error of each layer [layers] float64, the lowest first, when rounded to
    nearest and at the end: the root of the mean distance of the calibration windows' tokens."""

    params: Params
    before: np.ndarray
    after: np.ndarray


def quantize(
    model: Decoder,
    params: Params,
    windows: np.ndarray,
    format: Format,
    rule: str = MATRICES,
    per: str | None = "token",
    steps: int = 20,
    optimizer: optim.Config = OPTIMIZER,
    batch_size: int = 4,
    distance: Distance = relative,
    reads_full: bool = False,
    progress: Progress | None = None,
) -> Distilled:
    """The model with the matrices of layers whose path `rule` matches whole in few bits, distilled.

    windows [n, T] of tokens, without padding; a step sees `batch_size` of them, in turn. Inputs
    have 8 bits and one scale `per` "token" or "tensor", or stay as they are with None. 0 `steps` round to
    nearest. ValueError for other numbers of steps and other `per`, without a window, for a rule that
    matches outside of the layers, and, naming the path, for what `fake.add` refuses; RuleError when the
    rule matches nothing.
    """
    if steps < 0:
        raise ValueError(f"distillation takes 0 steps a layer or more, not {steps}")
    if per not in ("token", "tensor", None):
        raise ValueError(f"per is 'token', 'tensor' or None, not {per!r}")
    layerwise.require_inside(model, params, rule)
    errors = []

    def change(layer: Layer, own: Params, states: States, teacher: States) -> Params:
        student = fake.add(own, rule, format)
        student = student if per is None else int8.add(student, rule, per)
        read = teacher if reads_full else states
        target = [x for x, _ in layerwise.run(layer, own, teacher)]
        trained = train(layer, student, read, target, steps, optimizer, distance)
        before, after = (fake.finish(tree) for tree in (student, trained))
        found = [error(layer, tree, read, target, distance) for tree in (before, after)]
        better = found[1] < found[0]
        errors.append((found[0], found[1] if better else found[0]))
        return after if better else before

    made = layerwise.walk(model, params, windows, change, batch_size, True, progress)
    return Distilled(made, *np.asarray(errors).T)


def train(
    layer: Layer,
    student: Params,
    states: States,
    target: list[Array],
    steps: int,
    optimizer: optim.Config = OPTIMIZER,
    distance: Distance = relative,
) -> Params:
    """The layer's parameters after `steps` steps, of which step n sees batch n modulo their number.

    student: the layer's own parameters, of which those of `fake.add` train. target: [B, T, D] for each
    batch. RuleError when none of them is.
    """
    nodes = named_leaves(student, is_leaf=fake.is_fake)
    rounded = [re.escape(f"{name}/base") for name, w in nodes if fake.is_fake(w)]
    trainable, frozen = partition(student, "|".join(rounded))
    trainable = jax.tree.map(jnp.copy, trainable)  # a step's arguments are given away
    state = optim.optimizer(optimizer, trainable).init(trainable)
    for step in range(steps):
        of = step % len(states)
        trainable, state = _step(
            layer, optimizer, distance, trainable, state, frozen, states[of], target[of]
        )
    return combine(trainable, frozen)


def error(
    layer: Layer, params: Params, states: States, target: list[Array], distance: Distance = relative
) -> float:
    """The root of the mean distance of all tokens' outputs from their targets."""
    found = [x for x, _ in layerwise.run(layer, params, states)]
    each = [np.asarray(distance(y, t)).ravel() for y, t in zip(found, target, strict=True)]
    return float(np.concatenate(each).mean(dtype=np.float64) ** 0.5)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(
    layer: Layer,
    optimizer: optim.Config,
    distance: Distance,
    trainable: Params,
    state: optax.OptState,
    frozen: Params,
    batch: tuple[Array, Inputs],
    target: Array,
) -> tuple[Params, optax.OptState]:
    def loss(trainable: Params) -> Array:
        y = layerwise.apply(layer, combine(trainable, frozen), batch)
        return distance(y, target).mean()

    grad = jax.grad(loss)(trainable)
    moves, state = optim.optimizer(optimizer, trainable).update(grad, state, trainable)
    return optax.apply_updates(trainable, moves), state
