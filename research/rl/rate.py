"""A learning rate that the Source moves: by how far the last steps went from the policy that sampled."""

from __future__ import annotations

import jax
import optax


def scaled_by_batch(name: str = "rollout/lr_scale") -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the batch's scalar of that name; to be chained after an optimizer."""

    def init(params):
        return optax.EmptyState()

    def update(updates, state, params=None, *, batch, **extra):
        scale = batch[name]
        return jax.tree.map(lambda u: u * scale, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
