"""AdaLoRA's rank allocation: which triplets keep their singular value. Zhang et al. 2023, section 3.2
and algorithm 1 (arXiv:2303.10512); `adalora` holds the matrices.

    I  = |w * dL/dw|                        sensitivity of one weight
    Ī  = beta1 Ī + (1 - beta1) I            its average
    Ū  = beta2 Ū + (1 - beta2) |I - Ī|      its uncertainty, with Ī as it is after the line above
    s  = Ī * Ū                              importance of one weight
    S  = s(E_i) + mean over in of s(A_i) + mean over out of s(B_i)          of a triplet

At a step t (the first is 1) the b(t) triplets of highest S over *all* matrices keep their E and the
others get E = 0:

    t <= initial_steps      all of them, nothing is masked
    until F = total_steps - final_steps
                            target + (start - target) * (1 - (t - initial_steps) / (F - initial_steps))³
    afterwards              target; the mask of step F stays

Differences and choices, those of Hugging Face PEFT:
1. The allocation follows the optimizer's update: w is what the update made, dL/dw the gradient from
   before it. (PEFT reads `p.grad`, clipped where a trainer clips; ours is not clipped.)
2. A masked triplet has a gradient as before and can come back until step F.
3. Before F masks fall every `interval` steps, and E moves freely in between.
4. Triplets that tie with the last one masked are masked too, so that fewer than b(t) may be left.
5. From step F on importance is not updated.

A moving average (`Training.ema_decay`) does not become 0 where E does. target_rank = rank is AdaLoRA
without pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.paths import named_leaves
from research.types import Array, Params, PyTree
from research.weights.adalora import AdaLoRA, is_adalora


@dataclass(frozen=True)
class Allocation:
    """When to prune, and down to what: the `finish` of a `train.optim.Finished`.

    target_rank    average number of triplets a matrix at the end (PEFT's target_r)
    total_steps    of the whole training, `Training.steps`
    initial_steps  first steps without pruning (tinit)
    final_steps    last steps with a mask that stays (tfinal)
    interval       steps from one mask to the next (deltaT)
    beta1, beta2   of the averages of sensitivity and of uncertainty
    """

    target_rank: int
    total_steps: int
    initial_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self):
        least = {"target_rank": 1, "initial_steps": 0, "final_steps": 0, "interval": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                given = getattr(self, name)
                raise ValueError(f"Allocation.{name} must be at least {smallest}, not {given}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                given = getattr(self, name)
                raise ValueError(f"Allocation.{name} must lie between 0 and 1, not {given}")
        if self.initial_steps >= self.last_allocation:
            raise ValueError(
                f"Allocation: no step is left to prune in; initial_steps={self.initial_steps} and "
                f"final_steps={self.final_steps} of total_steps={self.total_steps}"
            )

    @property
    def last_allocation(self) -> int:
        """F, the step whose mask stays."""
        return self.total_steps - self.final_steps

    def __call__(self, trainable: Params) -> optax.GradientTransformationExtraArgs:
        """The transformation for the trained leaves; ValueError when no AdaLoRA is among them, one
        of them trains in part, or has fewer than target_rank triplets."""
        for name, node in _adaloras(trainable).items():
            if any(leaf is None for leaf in (node.a, node.e, node.b)):
                raise ValueError(f"{name}: a, e and b of an AdaLoRA must train together")
            if node.e.shape[-1] < self.target_rank:
                raise ValueError(
                    f"{name} has {node.e.shape[-1]} triplets, Allocation.target_rank is "
                    f"{self.target_rank}"
                )
        return allocate(self)


def budget(config: Allocation, step: int, start: int, target: int) -> int:
    """b(step), triplets over all matrices, of `start` at first and `target` at the end."""
    if step <= config.initial_steps:
        return start
    if step > config.last_allocation:
        return target
    past = (step - config.initial_steps) / (config.last_allocation - config.initial_steps)
    return int((start - target) * (1 - past) ** 3 + target)


def averaged(
    config: Allocation, sensitivity: PyTree, uncertainty: PyTree, weights: PyTree, grads: PyTree
) -> tuple[PyTree, PyTree]:
    """(Ī, Ū) after one more step; four trees of one structure."""
    now = jax.tree.map(lambda w, g: jnp.abs(w * g).astype(jnp.float32), weights, grads)
    mean = jax.tree.map(partial(_average, config.beta1), sensitivity, now)
    distance = jax.tree.map(lambda i, m: jnp.abs(i - m), now, mean)
    return mean, jax.tree.map(partial(_average, config.beta2), uncertainty, distance)


def _average(beta: float, old: Array, new: Array) -> Array:
    return beta * old + (1 - beta) * new


def triplet_scores(sensitivity: AdaLoRA, uncertainty: AdaLoRA) -> Array:
    """S [..., R] of one matrix or stack, from nodes that hold Ī and Ū in the places of a, e, b."""
    s = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
    return s.e + (s.a.mean(-2) + s.b.mean(-1))


def highest(scores: PyTree, count: Array | int) -> PyTree:
    """True for the `count` highest of all entries of the tree, fewer where the next one ties."""
    entries = jnp.sort(jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(scores)]))
    masked = entries.size - count
    threshold = entries[jnp.maximum(masked - 1, 0)]
    return jax.tree.map(lambda leaf: (leaf > threshold) | (masked <= 0), scores)


class AllocationState(NamedTuple):
    """count: steps taken. sensitivity, uncertainty: Ī and Ū in trees of the parameters' form, that
    hold nothing but AdaLoRAs. keep: bool [..., R] for each of them, the last mask."""

    count: Array
    sensitivity: Params
    uncertainty: Params
    keep: PyTree


def allocate(config: Allocation) -> optax.GradientTransformationExtraArgs:
    """Updates whose sum with the parameters has E = 0 where a triplet is masked.

    Last in a chain: what arrives must be what would be added to the parameters. `update` needs
    `params` and the gradient as `grad`, which `train.step` hands over.
    """

    def init(params: Params) -> AllocationState:
        triplets = _triplets(params)
        # Two trees of arrays of their own: the training step donates its state.
        zeros = [jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), triplets) for _ in "IU"]
        keep = jax.tree.map(lambda w: jnp.ones(w.e.shape, bool), triplets, is_leaf=is_adalora)
        return AllocationState(jnp.zeros([], jnp.int32), *zeros, keep)

    def update(updates, state, params=None, *, grad=None, **extra):
        if params is None or grad is None:
            raise ValueError("AdaLoRA's allocation needs the parameters and `grad`, the gradient")
        state, masks = _advance(config, state, optax.apply_updates(params, updates), grad)

        def finish(move: Any, w: Any, keep: Any) -> Any:
            if not is_adalora(move):
                return move
            kept = keep | ~masks
            return move.replace(e=jnp.where(kept, move.e, -w.e.astype(move.e.dtype)))

        return jax.tree.map(finish, updates, params, state.keep, is_leaf=is_adalora), state

    return optax.GradientTransformationExtraArgs(init, update)


def _advance(
    config: Allocation, state: AllocationState, moved: Params, grad: Params
) -> tuple[AllocationState, Array]:
    """(the state after a step, whether this step masks)."""
    step, last = state.count + 1, config.last_allocation
    new = averaged(config, state.sensitivity, state.uncertainty, _triplets(moved), _triplets(grad))
    old = (state.sensitivity, state.uncertainty)
    means = jax.tree.map(lambda n, o: jnp.where(step < last, n, o), new, old)
    scores = jax.tree.map(triplet_scores, *means, is_leaf=is_adalora)
    chosen = highest(scores, _budgets(config, scores)[jnp.minimum(step, last)])
    pruning = (step > config.initial_steps) & (step < last) & (step % config.interval == 0)
    allocates = pruning | (step == last)
    keep = jax.tree.map(lambda n, o: jnp.where(allocates, n, o), chosen, state.keep)
    return AllocationState(step, *means, keep), allocates | (step > last)


def _budgets(config: Allocation, scores: PyTree) -> Array:
    """b of the steps 0 to F. A table, because float32 would round some of them to the wrong side."""
    leaves = jax.tree.leaves(scores)
    start = sum(leaf.size for leaf in leaves)
    matrices = sum(leaf.size // leaf.shape[-1] for leaf in leaves)
    target = config.target_rank * matrices
    steps = range(config.last_allocation + 1)
    return jnp.asarray(np.array([budget(config, t, start, target) for t in steps], np.int32))


def _adaloras(tree: Params) -> dict[str, AdaLoRA]:
    """{path: node}; ValueError when there is none."""
    nodes = {n: w for n, w in named_leaves(tree, is_leaf=is_adalora) if is_adalora(w)}
    if not nodes:
        raise ValueError("there is no AdaLoRA among the trained leaves to allocate ranks to")
    return nodes


def _triplets(tree: Params) -> Params:
    """The tree with nothing in it but AdaLoRAs, without their bases."""
    return jax.tree.map(
        lambda w: w.replace(base=None) if is_adalora(w) else None, tree, is_leaf=is_adalora
    )
