"""NEFTune: uniform noise on token embeddings while training. Jain et al. 2023 (arXiv:2310.05914).

    e + (alpha / sqrt(T D)) u,   u ~ U(-1, 1) for every entry of the embeddings e [B, T, D]

Differences and choices:
1. It is a Weight around the table that acts only where rows are taken and only when there is a
   dropout key, as in training; a head tied to the table multiplies by the table as it is.
2. T is `ids.shape[-1]`, the length of the batch's rows with their padding, as in transformers and
   trl; the paper's own code counts each example's tokens without padding. Where rows are packed,
   several examples share a row's T: `length` puts the usual length of an example in its place.
3. A model that multiplies its embeddings (`DecoderConfig.embed_scale`) multiplies the noise too.

alpha = 0 is the base. The paper takes 5 to 15, mostly 5.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from research.paths import map_named, named_leaves, require_match
from research.types import Array, Params
from research.weights.base import (
    Call,
    Weight,
    dense,
    is_weight,
    matmul,
    matmul_transposed,
    take,
)

TRAINABLE = r".*"  # all of the model: the noise has no parameters
_STREAM = 0x4E45  # the key of the noise, apart from what the base draws


@struct.dataclass
class Noisy(Weight):
    """`base` [V, D], with noise on the rows that are taken in training."""

    base: Any
    alpha: float = struct.field(pytree_node=False)
    length: int | None = struct.field(pytree_node=False, default=None)

    def dense(self) -> Array:
        return dense(self.base)

    def matmul(self, x: Array, call: Call) -> Array:
        return matmul(x, self.base, call)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return matmul_transposed(x, self.base, call)

    def take(self, ids: Array, call: Call) -> Array:
        rows = take(self.base, ids, call)
        if call.dropout is None or self.alpha == 0:
            return rows
        T = ids.shape[-1] if self.length is None else self.length
        size = self.alpha / (T * rows.shape[-1]) ** 0.5
        key = jax.random.fold_in(call.dropout, _STREAM)
        noise = jax.random.uniform(key, rows.shape, minval=-size, maxval=size)
        return rows + noise.astype(rows.dtype)

    def axes(self, names: tuple) -> Noisy:
        return self.replace(base=self.base.axes(names) if is_weight(self.base) else names)


def add(
    params: Params, rule: str = r"embed/table", alpha: float = 5.0, length: int | None = None
) -> Params:
    """Params with noise on the embedding tables whose paths `rule` matches whole.

    RuleError when the rule matches nothing, ValueError for a leaf that is no table, a negative
    alpha or a length below 1.
    """
    if alpha < 0:
        raise ValueError(f"NEFTune needs alpha >= 0, not {alpha}")
    if length is not None and length < 1:
        raise ValueError(f"NEFTune's length counts tokens, at least 1, not {length}")
    names = [name for name, _ in named_leaves(params, is_leaf=is_weight)]
    chosen = set(require_match(rule, names))

    def wrap(name: str, leaf: Any) -> Any:
        if name not in chosen:
            return leaf
        if not name.endswith("/table"):
            raise ValueError(f"NEFTune stands on embedding tables (.../table), not {name}")
        return Noisy(leaf, float(alpha), length)

    return map_named(wrap, params, is_leaf=is_weight)


def remove(params: Params) -> Params:
    """The model without the noise, its tables as they were trained."""
    return jax.tree.map(lambda w: w.base if isinstance(w, Noisy) else w, params, is_leaf=is_weight)
