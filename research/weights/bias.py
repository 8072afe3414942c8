"""BitFit: only biases are trained. Ben Zaken et al. 2021 (arXiv:2106.10199).

    x W + b  with W as it was,  x W  becomes  x W + b  with b = 0 where a layer had no bias

A model that has biases needs no more than the path rule `TRAINABLE`. Families without any (LLaMA)
get them with `add`, which leaves the function as it is at first.

Differences and choices:
1. The paper's models have a bias on every linear layer and every norm, and `TRAINABLE` matches all
   of them. The half that it found nearly as good, those of queries and of the first matrix of the
   feed-forward network, is `QUERY_AND_UP`.
2. Models with RMSNorm have no bias in a norm, and none is added.
3. `NORMS` trains the scales (and biases) of norms alone: Zhao et al. 2023 (arXiv:2312.11420).

No matrix holds a bias: `base.merge` refuses a model with `Biased` kernels and names the first. For
a model of the same sizes whose layers have biases, `move` gives the parameters.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

from research.paths import map_named, named_leaves
from research.types import Array, Params
from research.weights.base import Call, Weight, change, is_weight, matmul, matrix_shape

# Path rules for `partition`. A bias that was added is .../kernel/bias, one of the model .../bias.
TRAINABLE = r".*/bias"
QUERY_AND_UP = r".*/(attention/q|ffn/up)/(kernel/)?bias"
NORMS = r"(.*/)?\w*norm/(scale|bias)"


@struct.dataclass
class Biased(Weight):
    """x W + bias. base [..., in, out], bias [..., out]."""

    base: Any
    bias: Array

    def dense(self) -> Array:
        raise ValueError(
            f"Biased adds a bias, of shape {list(self.bias.shape)}, which no matrix can say: move it "
            "to a model that has one there (`bias.move`), or give it up (`bias.remove`)"
        )

    def matmul(self, x: Array, call: Call) -> Array:
        y = matmul(x, self.base, call)
        return y + self.bias.astype(y.dtype)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        raise ValueError("Biased has no transposed product: it stands on kernels, not on tables")

    def take(self, ids: Array, call: Call) -> Array:
        raise ValueError("Biased has no rows to take: it stands on kernels, not on tables")

    def axes(self, names: tuple) -> Biased:
        base = self.base.axes(names) if is_weight(self.base) else names
        return Biased(base, (*names[:-2], names[-1]))


def add(params: Params, rule: str, rng: Array | None = None) -> Params:
    """Params with a bias of zeros at every kernel whose path `rule` matches whole.

    rule: e.g. r".*/(attention|ffn)/\\w+/kernel". Nothing is drawn from `rng`: it is there because all
    methods are added alike. RuleError when the rule matches nothing; ValueError for a leaf that is
    not a kernel, and for a layer that has a bias already.
    """
    names = {name for name, _ in named_leaves(params, is_leaf=is_weight)}

    def wrap(name: str, w: Any, number: int) -> Biased:
        *layers, _, outer = matrix_shape("Biased", name, w)
        if not name.endswith("/kernel"):
            raise ValueError(f"Biased stands on kernels, not on {name}")
        own = bias_beside(name)
        if own in names:
            raise ValueError(f"the layer of {name} has a bias already: train {own}")
        return Biased(w, jnp.zeros((*layers, outer)))

    return change(params, rule, wrap)


def bias_beside(kernel: str) -> str:
    """The path of the bias of the layer whose matrix is at `kernel`."""
    return kernel.removesuffix("kernel") + "bias"


def move(params: Params, like: Params) -> Params:
    """The same function as parameters of a model whose layers have biases themselves.

    `like` is that model's tree, of arrays or of shapes; a bias of its that nothing was added for is
    zero. ValueError naming the path when `like` lacks the place of a bias or of another leaf.
    """
    leaves = dict(named_leaves(params, is_leaf=is_weight))
    moved = {name: w.base if isinstance(w, Biased) else w for name, w in leaves.items()}
    added = {bias_beside(name): w.bias for name, w in leaves.items() if isinstance(w, Biased)}
    moved |= added
    places = {name for name, _ in named_leaves(like)}
    for name in moved.keys() - places:
        raise ValueError(f"the other model has no {name}; its layers need a bias there")

    def of(name: str, place: Any) -> Any:
        if name in moved:
            return moved[name]
        if not name.endswith("/bias"):
            raise ValueError(f"the other model has {name}, which is not in these parameters")
        return jnp.zeros(place.shape, place.dtype)

    return map_named(of, like)


def remove(params: Params) -> Params:
    """The base model again, the biases that were added forgotten."""

    def base_of(name: str, w: Any) -> Any:
        return w.base if isinstance(w, Biased) else w

    return map_named(base_of, params, is_leaf=is_weight)
