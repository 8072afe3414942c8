"""Groups of integers whose range is smaller than their numbers': the largest are clipped, and all the
others have smaller steps.

Of each group the range is shrunk by several ratios, and the one with the least error stays. The error of
a group of rounding errors e, of rows whose groups lie along what is summed, is one of

    eᵀ e                 of the matrix itself                     (importance None)
    eᵀ diag(E[x²]) e     of the output, were its inputs unrelated (importance [in])
    eᵀ E[x xᵀ] e         of the output's part that this group is  (importance [in, in])

with the group's own part of the importance. The last is what AWQ's code measures on stored inputs
(Lin et al. 2023, arXiv:2306.00978): Σ (eᵀx)² = eᵀ (Σ x xᵀ) e exactly, so no input need be stored. Groups
are looked at one by one, as there. What they do to each other is seen at the end, which there it is not:
a row whose output is worse for being clipped, eᵀ E[x xᵀ] e of all its groups, keeps its ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.quantize.calibrate import Statistics
from research.quantize.rescale import statistic
from research.types import Array, Params
from research.weights.base import change
from research.weights.formats import Integer, grouped
from research.weights.quantized import Quantized, packed, require_dense

SHRINKS = tuple(float(x) for x in np.linspace(1, 0.5, 11).round(2))


def quantize(
    params: Params,
    rule: str,
    format: Integer,
    statistics: Statistics | None = None,
    shrinks: Sequence[float] = SHRINKS,
) -> Params:
    """Params with every matrix whose path `rule` matches whole in few bits, each group clipped.

    statistics {path: `measures.moments` of its inputs} weigh the errors by E[x xᵀ]; without, they are
    those of the matrix. Errors as in `quantized.quantize`, and ValueError for a format that is not an
    Integer and for a matrix without statistics.
    """

    def encode(name: str, w: Any, number: int) -> Quantized:
        require_dense("quantization", name, w)
        importance = None
        if statistics is not None:
            found = statistic(statistics, name)
            importance = found["second"] / found["rows"][..., None, None]
        transposed = not name.endswith("/table")
        try:
            rows = (w.mT if transposed else w).astype(jnp.float32)
            scale, zero = ranges(rows, format, importance, shrinks)
            return packed(format.round(rows, scale, zero), scale, zero, format, transposed)
        except ValueError as error:
            raise ValueError(f"{name} {w.shape}: {error}") from error

    return change(params, rule, encode)


def ranges(
    rows: Array,
    format: Integer,
    importance: Array | None = None,
    shrinks: Sequence[float] = SHRINKS,
) -> tuple[Array, Array | None]:
    """(scale, zero) of rows [..., rows, columns], each group's range the best of `shrinks` of it.

    importance: None, [..., columns] or [..., columns, columns], see above. Where two are equally good
    it is the one named first. ValueError for formats that are not Integer, and shrinks outside (0, 1].
    """
    if not isinstance(format, Integer):
        raise ValueError(f"clipping needs an Integer format, whose range is free, not {format}")
    if not len(shrinks) or not all(0 < shrink <= 1 for shrink in shrinks):
        raise ValueError(f"shrinks are ratios above 0 and at most 1, not {shrinks}")
    if importance is not None and importance.shape[-1] != rows.shape[-1]:
        raise ValueError(
            f"the importance is of {importance.shape[-1]} columns, not {rows.shape[-1]}"
        )
    jax.eval_shape(lambda rows: grouped(rows, format.group), rows)
    return _ranges(rows, importance, jnp.asarray(shrinks, jnp.float32), format)


@partial(jax.jit, static_argnames="format")
def _ranges(
    rows: Array, importance: Array | None, shrinks: Array, format: Integer
) -> tuple[Array, Array | None]:
    parts = None if importance is None else _parts(rows, importance, format)

    def error_of(shrink: Array) -> Array:
        return group_errors(_wrong(rows, format, shrink), parts, format)

    errors = jax.lax.map(error_of, shrinks)  # one after another: each takes the memory of all rows
    best = shrinks[jnp.argmin(errors, axis=0)]
    if importance is not None and importance.ndim == rows.ndim:
        whole, clipped = (
            row_errors(_wrong(rows, format, shrink), importance) for shrink in (1.0, best)
        )
        if format.group == "matrix":
            whole, clipped = (each.sum(axis=-1, keepdims=True) for each in (whole, clipped))
        best = jnp.where((clipped < whole)[..., None], best, 1.0)
    return shrunk(rows, format, best)


def _wrong(rows: Array, format: Integer, shrink: Array | float) -> Array:
    scale, zero = shrunk(rows, format, shrink)
    return format.values(format.round(rows, scale, zero), scale, zero) - rows


def shrunk(rows: Array, format: Integer, shrink: Array | float) -> tuple[Array, Array | None]:
    """(scale, zero) of groups whose magnitudes are clipped at `shrink` of their largest.

    shrink: a scalar or [..., rows or 1, groups].
    """
    cut = grouped(rows, format.group)
    most = jnp.abs(cut).max(axis=-1) * shrink
    low, high = (jnp.clip(end(axis=-1), -most, most) for end in (cut.min, cut.max))
    return format.from_range(low, high)


def _parts(rows: Array, importance: Array, format: Integer) -> Array:
    """The importance of each group's own columns: [..., groups, size] or [..., groups, size, size]."""
    columns = rows.shape[-1]
    size = format.group if isinstance(format.group, int) else columns
    if importance.ndim == rows.ndim - 1:
        return importance.reshape(*importance.shape[:-1], -1, size)
    blocks = importance.reshape(*importance.shape[:-2], columns // size, size, -1, size)
    return jnp.einsum("...gagb->...gab", blocks)


def row_errors(wrong: Array, second: Array) -> Array:
    """Σ (eᵀx)² of each row e of rounding errors [..., rows, columns]: second [..., columns, columns] is
    Σ x xᵀ, so that this is eᵀ second e."""
    return ((wrong @ second) * wrong).sum(axis=-1)


def group_errors(wrong: Array, parts: Array | None, format: Integer) -> Array:
    """The error [..., rows or 1, groups] of rounding errors [..., rows, columns]."""
    whole = format.group == "matrix"
    cut = grouped(wrong, "row" if whole else format.group)
    if parts is None:
        found = jnp.square(cut).sum(axis=-1)
    elif parts.ndim == cut.ndim - 1:
        found = (jnp.square(cut) * parts[..., None, :, :]).sum(axis=-1)
    else:
        found = (jnp.einsum("...rga,...gab->...rgb", cut, parts) * cut).sum(axis=-1)
    return found.sum(axis=-2, keepdims=True) if whole else found
