"""LoftQ: a quantized base and LoRA factors that are fitted to a matrix together.

Li et al. 2023 (arXiv:2310.08659), algorithm 1. From A B = 0, in every step

    Q = quantize(W - A B),   A B = the best product of the rank for W - Q (its leading singular triples)

so that Q + A B is nearer to W than Q alone, which is where QLoRA begins.

Differs from the paper:
1. More steps need not be better: of all steps each matrix of each layer keeps the best.
2. A B carries LoRA's scale alpha / rank, and both factors the root of it.
3. Any format, integers with zeros and double quantization among them.
4. steps=0 is QLoRA: the matrix quantized, B = 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from research.types import Array, Params
from research.weights import lora, lora_init
from research.weights.base import change, matrix_shape
from research.weights.formats import Format
from research.weights.lora import LoRA
from research.weights.quantized import quantize, quantized, require_dense


def add(
    params: Params,
    rule: str,
    rng: Array,
    rank: int,
    format: Format,
    steps: int = 5,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> Params:
    """Params with a LoRA over a quantized base for every matrix whose path `rule` matches whole.

    rng is for steps=0 alone, and alpha defaults to `rank`. After more than one step the base is not
    the quantized matrix, and the node says so (`residual`): `lora.remove` refuses it. RuleError when
    the rule matches nothing; ValueError as in `quantize` and `lora.add`, and for steps below 0.
    """
    if steps < 0 or rank < 1:
        raise ValueError(
            f"LoftQ needs steps of at least 0 and a rank of at least 1: {steps}, {rank}"
        )
    if steps == 0:
        return lora.add(quantize(params, rule, format), rule, rng, rank, alpha, dropout)
    scale = (rank if alpha is None else alpha) / rank

    def wrap(name: str, w: Any, number: int) -> LoRA:
        base, a, b, _ = fit(name, w, rank, format, steps, scale)
        return LoRA(base, a, b, scale, dropout, residual=steps > 1)

    return change(params, rule, wrap)


def fit(
    name: str, w: Array, rank: int, format: Format, steps: int, scale: float
) -> tuple[Any, Array, Array, Array]:
    """(Q, a, b, errors [steps, ...]) for w [..., in, out]: the best of `steps` steps, and after each
    step ‖w - (Q + scale a b)‖_F of each layer."""
    require_dense("LoftQ", name, w)
    matrix_shape("LoftQ", name, w, rank)
    target, best, errors = w.astype(jnp.float32), None, []
    for _ in range(steps):
        base = quantized(name, target, format)
        rest = w.astype(jnp.float32) - base.dense()
        u, s, vt = jnp.linalg.svd(rest, full_matrices=False)
        left, a, b = lora_init.principal(rest, u, s, vt, rank, scale)
        target = base.dense() + left
        error = jnp.linalg.norm(left, axis=(-2, -1))
        better = None if best is None else error < jnp.min(jnp.stack(errors), axis=0)
        found = (base, a, b)
        best = found if best is None else choose(better, found, best)
        errors.append(error)
    return *best, jnp.stack(errors)


def choose(better: Array, one: Any, other: Any) -> Any:
    """Leaves of `one` in those layers [...] where `better`, else of `other`."""

    def pick(x: Array, y: Array) -> Array:
        return jnp.where(better.reshape(better.shape + (1,) * (x.ndim - better.ndim)), x, y)

    return jax.tree.map(pick, one, other)
