"""Gradients through rounding: Bengio, Léonard and Courville 2013 (arXiv:1308.3432), section 4.

A rounded number has derivative 0 almost everywhere. The straight-through estimator takes the
derivative of something smooth instead, mostly of what was there before rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.types import Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def straight_through(value: Callable, smooth: Callable, *args: Any) -> Array:
    """`value(*args)`, with the gradient of `smooth(*args)`, which has the same shape and dtype.

    Arguments are arrays or trees, integers among them. Only they are kept for the backward pass.
    """
    return value(*args)


def _forward(value: Callable, smooth: Callable, *args: Any) -> tuple[Array, Any]:
    return value(*args), args


def _backward(value: Callable, smooth: Callable, args: Any, g: Array) -> Any:
    return jax.vjp(smooth, *args)[1](g)


straight_through.defvjp(_forward, _backward)


def round_through(x: Array) -> Array:
    """x to the nearest integer, of two the even one; its gradient passes."""
    return straight_through(jnp.round, lambda x: x, x)
