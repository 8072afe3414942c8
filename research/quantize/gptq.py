"""GPTQ: columns rounded one by one, each column's error made good by those that are left.

Frantar et al. 2022 (arXiv:2210.17323). A matrix is rounded so that its products with real inputs
change least: minimise ||(W - Q) X||² for rows W [out, in], which knows the inputs only by H = 2 E[x xᵀ].
With the upper triangular U of H^-1 = Uᵀ U, a column j that is rounded to q changes those after it by

    W[:, j:] -= (W[:, j] - q) / U[j, j] · U[j, j:]

which is what eliminating j from H^-1 gives (Optimal Brain Quantization), all rows in one order.

Columns are taken in blocks, and what a block changes after itself is one product (the paper's lazy
batches, section 3.3): so a column touches [out, block] numbers and not [out, in], and a group's scale is
found where a block begins. Groups are blocks; otherwise a block has up to 128 columns.

Differs from the authors' code:
1. Scales of a group come from its weights as all columns before have changed them. There columns of
   the same batch of 128 have not yet.
2. With `act_order` the scales of groups are those of the given weights (there an option,
   `static_groups`), so that a group stays a run of neighbouring columns.
3. A column whose input was always 0 (H_jj = 0) is rounded by itself. There it becomes 0.
4. U is found from a Cholesky factor of H by substitution, without the inverse, for float32's sake.
5. Scales that are double quantized are so afterwards: that error is not made good.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from research.types import Array
from research.weights.formats import Format, spread

BLOCK = 128

# (codes uint8 [..., out, in], scale [..., out or 1, groups], zero like scale, or None)
Rounded = tuple[Array, Array, Array | None]


def quantize(
    rows: Array,
    hessian: Array,
    format: Format,
    damping: float = 0.01,
    act_order: bool = False,
) -> Rounded:
    """rows [..., out, in] and their Hessian [..., in, in] as codes: not packed, in the given order.

    `damping` times the mean of the Hessian's diagonal is added to it. `act_order` takes columns of
    large inputs first. ValueError for shapes that do not fit, groups that do not fill the rows, and
    a Hessian that is not positive definite; under jit the scales are nan then.
    """
    if hessian.shape != (*rows.shape[:-2], rows.shape[-1], rows.shape[-1]):
        raise ValueError(
            f"rows {rows.shape} need a Hessian [..., in, in] of their inputs, not {hessian.shape}"
        )
    if damping < 0:
        raise ValueError(f"damping is not below 0, and {damping} is")
    codes, scale, zero, definite = _quantize(rows, hessian, format, damping, act_order)
    if not isinstance(definite, jax.core.Tracer) and not definite.all():
        raise ValueError(
            f"the Hessian {hessian.shape} is not positive definite with damping {damping}: there are "
            "fewer inputs than columns, some inputs follow from others, or some are nan or inf; "
            "give more inputs or more damping"
        )
    return codes, scale, zero


@partial(jax.jit, static_argnames=("format", "act_order"))
def _quantize(
    rows: Array, hessian: Array, format: Format, damping: float, act_order: bool
) -> tuple[Array, Array, Array | None, Array]:
    one = partial(_matrix, format=format, damping=damping, act_order=act_order)
    for _ in rows.shape[:-2]:
        one = jax.vmap(one)
    return one(rows.astype(jnp.float32), hessian.astype(jnp.float32))


def _matrix(
    rows: Array, hessian: Array, format: Format, damping: float, act_order: bool
) -> tuple[Array, Array, Array | None, Array]:
    """Codes, scale and zero of one matrix, and whether its Hessian is positive definite."""
    width = rows.shape[1]
    scale, zero = format.scales(rows)
    order = jnp.argsort(-jnp.diagonal(hessian)) if act_order else jnp.arange(width)
    factor, definite = inverse_factor(hessian[order][:, order], damping)
    if act_order or not isinstance(format.group, int):
        block = max(n for n in range(1, min(width, BLOCK) + 1) if width % n == 0)
        given = jax.tree.map(lambda s: _by_block(s, order, block), (scale, zero))
        codes, _ = _columns(rows.T[order], factor, format, block, given)
        codes = codes[jnp.argsort(order)]
    else:
        codes, found = _columns(rows.T, factor, format, format.group, None)
        scale, zero = jax.tree.map(lambda s: s[..., 0].T, found)
    return codes.T, jnp.where(definite, scale, jnp.nan), zero, definite


def inverse_factor(hessian: Array, damping: float) -> tuple[Array, Array]:
    """(U [in, in], upper triangular, with H^-1 = Uᵀ U; whether H is positive definite), H damped.

    A column that has no input counts as one of mean size that nothing else follows.
    """
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    mean = diagonal.sum() / jnp.maximum((~dead).sum(), 1)
    mean = jnp.where(mean == 0, 1, mean)
    damped = hessian + jnp.diag(jnp.where(dead, mean, 0) + damping * mean)
    # H = R Rᵀ with an upper triangular R is the usual factorization from the other end; U = R^-1.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    factor = jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(upper)))
    # What is left of a column that others determine is rounding, of either sign.
    rounding = 8 * jnp.finfo(jnp.float32).eps * jnp.diagonal(damped)
    return factor, (jnp.square(jnp.diagonal(upper)) > rounding).all()


def _by_block(scale: Array, order: Array, block: int) -> Array:
    """Scales [out or 1, groups] for each column in `order`: [blocks, block, out or 1, 1]."""
    each = spread(scale, len(order)).T[order]
    return each.reshape(-1, block, each.shape[1], 1)


def _columns(
    columns: Array, factor: Array, format: Format, block: int, given: tuple | None
) -> tuple[Array, tuple[Array, Array | None]]:
    """Columns [in, out] as codes [in, out], and the scales of every block, [blocks, out or 1, 1].

    `given` are scales and zeros [blocks, block, out or 1, 1]; without them a block is a group.
    """

    def step(columns: Array, scanned: tuple) -> tuple[Array, tuple]:
        at, factor, given = scanned
        part = jax.lax.dynamic_slice_in_dim(columns, at, block)
        found = None if given else format.scales(part.T)
        each = given or jax.tree.map(lambda s: jnp.broadcast_to(s, (block, *s.shape)), found)
        upper = jax.lax.dynamic_slice_in_dim(factor, at, block, axis=1)
        codes, errors = _block(part, upper, format, *each)
        # Columns before the end of the block are changed too, and not looked at again.
        return columns - factor.T @ errors, (codes, found)

    starts = jnp.arange(0, len(columns), block)
    scanned = (starts, factor.reshape(-1, block, len(columns)), given)
    _, (codes, found) = jax.lax.scan(step, columns, scanned)
    return codes.reshape(columns.shape), found


def _block(
    part: Array, upper: Array, format: Format, scale: Array, zero: Array | None
) -> tuple[Array, Array]:
    """Columns [block, out] as codes and errors [block, out]; scale, zero [block, out or 1, 1]."""

    def step(part: Array, scanned: tuple) -> tuple[Array, tuple[Array, Array]]:
        at, row, scale, zero = scanned
        column = part[at][:, None]
        code = format.round(column, scale, zero)
        error = (column - format.values(code, scale, zero))[:, 0] / row[at]
        return part - row[:, None] * error, (code[:, 0], error)

    return jax.lax.scan(step, part, (jnp.arange(len(part)), upper, scale, zero))[1]
