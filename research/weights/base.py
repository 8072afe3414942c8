"""A Weight stands in the parameter tree where a matrix stood, and decides how to multiply.

The matrices it denotes have shape [..., in, out]: a layer computes x @ W. Leading axes are layers
(a scanned stack slices them off before anyone multiplies), so every array leaf of a Weight must
carry the same leading axes; a scalar per matrix is an array of shape [...], never a Python float
that differs between layers.

A Weight is a pytree, so it passes through jit, grad, scan, optax and orbax like an array. It is
also a Linen `AxisMetadata`: should stock Flax code meet it, `unbox` gives the dense matrix.
Weights nest: LoRA(base=NF4(...)) is QLoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from research.paths import map_named, named_leaves, require_match
from research.types import Array, Params


@struct.dataclass
class Call:
    """What a multiplication may need beyond its operands."""

    dropout: Array | None = None  # rng of this layer and step; None outside training


EVALUATE = Call()


class Weight(nn.meta.AxisMetadata):
    """Interface and correct defaults; subclasses are `flax.struct.dataclass`es."""

    def dense(self) -> Array:
        """The matrix this stands for, [..., in, out]."""
        raise NotImplementedError(f"{type(self).__name__} must say which matrix it denotes")

    def matmul(self, x: Array, call: Call) -> Array:
        """x [M, in] -> [M, out]. The dense form is rebuilt, not kept, for the backward pass."""
        product = jax.checkpoint(lambda w, x: x @ w.dense().astype(x.dtype), prevent_cse=False)
        return product(self, x)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        """x [M, out] -> [M, in]: multiplication by Wᵀ, for a tied output head."""
        product = jax.checkpoint(lambda w, x: x @ w.dense().astype(x.dtype).T, prevent_cse=False)
        return product(self, x)

    def take(self, ids: Array, call: Call) -> Array:
        """Rows `ids` of the matrix: [...] -> [..., out], for an embedding table."""
        return jnp.take(self.dense(), ids, axis=0)

    def row_count(self) -> int:
        """How many rows `take` can read: those of the matrix, or of the Weight it stands on."""
        base = getattr(self, "base", None)
        return row_count(base) if base is not None else jax.eval_shape(dense, self).shape[-2]

    def axes(self, names: tuple) -> Weight:
        """The same node with every array leaf replaced by its tuple of logical axis names."""
        raise NotImplementedError(f"{type(self).__name__} must name the axes of its leaves")

    # What Linen asks of boxed metadata.
    def unbox(self) -> Array:
        return self.dense()

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict) -> Weight:
        return self

    def remove_axis(self, index: int, params: dict) -> Weight:
        return self


def is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def matmul(x: Array, w: Array | Weight, call: Call = EVALUATE) -> Array:
    """x [..., in] times w [in, out]: the one place where a matrix's representation is looked at.

    The leading axes are one while multiplying: XLA's CPU backend takes up to twice as long for the
    gradient of a matrix that contracts several axes, and other backends do not care.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = w.matmul(rows, call) if is_weight(w) else rows @ w.astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# Up to so many rows XLA's CPU products are faster with the large matrix on the left.
FEW_ROWS = 16


def matmul_transposed(x: Array, w: Array | Weight, call: Call = EVALUATE) -> Array:
    """x [..., out] times wᵀ, w [in, out]."""
    rows = x.reshape(-1, x.shape[-1])
    if is_weight(w):
        y = w.matmul_transposed(rows, call)
    elif rows.shape[0] <= FEW_ROWS:
        y = (w.astype(x.dtype) @ rows.T).T
    else:
        y = rows @ w.astype(x.dtype).T
    return y.reshape(*x.shape[:-1], y.shape[-1])


def take(w: Array | Weight, ids: Array, call: Call = EVALUATE) -> Array:
    """Rows `ids` of w [in, out]: [...] -> [..., out]."""
    return w.take(ids, call) if is_weight(w) else jnp.take(w, ids, axis=0)


def row_count(w: Array | Weight) -> int:
    """How many rows of w [..., in, out] there are to take."""
    return w.row_count() if is_weight(w) else w.shape[-2]


def dropped(x: Array, rate: float, call: Call) -> Array:
    """Each entry 0 with probability `rate`, else divided by 1 - rate; x itself outside training."""
    if call.dropout is None or rate == 0:
        return x
    keep = jax.random.bernoulli(call.dropout, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def dense(w: Array | Weight) -> Array:
    """The matrix as an array."""
    return w.dense() if is_weight(w) else w


def change(params: Params, rule: str, of: Callable[[str, Any, int], Any]) -> Params:
    """Params with `of(path, w, number)` for every array or Weight whose path `rule` matches whole.

    `number` counts all of them in tree order, for `fold_in`. RuleError when none matches.
    """
    names = [name for name, _ in named_leaves(params, is_leaf=is_weight)]
    numbers = {name: names.index(name) for name in require_match(rule, names)}

    def apply(name: str, w: Any) -> Any:
        return of(name, w, numbers[name]) if name in numbers else w

    return map_named(apply, params, is_leaf=is_weight)


def matrix_shape(method: str, name: str, w: Array | Weight, rank: int = 1) -> tuple[int, ...]:
    """[..., in, out] of what stands at `name`; ValueError when it is not a matrix, or has no product
    of so high a `rank`."""
    shape = jax.eval_shape(dense, w).shape
    if len(shape) < 2 or not name.endswith(("/kernel", "/table")):
        raise ValueError(
            f"{method} stands on matrices (.../kernel or .../table), not {name} {shape}"
        )
    if rank > min(shape[-2:]):
        raise ValueError(
            f"{method} needs a rank of at most {min(shape[-2:])} for {name} {shape}, not {rank}"
        )
    return shape


def merge(params: Params) -> Params:
    """The same function with every Weight replaced by the dense matrix it denotes.

    ValueError naming the path of one that does what no matrix can (a bias, a choice of adapters).
    """

    def matrix(name: str, w: Any) -> Array:
        try:
            return dense(w)
        except ValueError as error:
            raise ValueError(f"{name} cannot be merged: {error}") from error

    return map_named(matrix, params, is_leaf=is_weight)


def leaf_axes(params: Params, axes: Params) -> Params:
    """`axes` (a tuple of names per matrix) spread over the leaves of the Weights in `params`."""
    return jax.tree.map(
        lambda w, names: w.axes(names) if is_weight(w) else names, params, axes, is_leaf=is_weight
    )
