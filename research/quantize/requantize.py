"""Adapters over quantized matrices merged into them: a model that is as small as before.

`base.merge` gives dense matrices instead. What is rounded again moves by up to half a step, so that an
update much smaller than that is lost in most weights (QA-LoRA, arXiv:2309.14717): measure the
model that comes out, not the one that went in.
"""

from __future__ import annotations

from typing import Any

import jax

from research.paths import map_named
from research.types import Params
from research.weights.base import is_weight, merge
from research.weights.int8 import QuantizedInputs
from research.weights.outliers import Decomposed
from research.weights.quantized import Quantized, is_quantized, quantized


def requantize(params: Params) -> Params:
    """Params in which every adapter is merged, and quantized again in the format of its base.

    What is no Weight or a `Quantized` alone stays; an adapter on a dense matrix becomes dense. ValueError
    naming the path of one that does what no matrix can, or whose merged matrix is not finite, and of a
    matrix whose inputs are rounded too: merging would drop that.
    """

    def encode(name: str, w: Any) -> Any:
        if not is_weight(w) or is_quantized(w):
            return w
        if rounds_inputs(w):
            raise ValueError(
                f"{name}: its inputs are rounded too ({type(w).__name__}); quantize the merged matrix "
                "and round its inputs again instead"
            )
        merged, below = merge({name: w})[name], quantized_in(w)
        return merged if below is None else quantized(name, merged, below.format)

    return map_named(encode, params, is_leaf=is_weight)


def rounds_inputs(w: Any) -> bool:
    """Whether `w`, or what it stands on, multiplies rounded inputs."""
    while is_weight(w):
        if isinstance(w, QuantizedInputs | Decomposed):
            return True
        w = getattr(w, "base", None)
    return False


def quantized_in(w: Any) -> Quantized | None:
    """The quantized matrix that `w` is or stands on, if there is one."""
    found = [node for node in jax.tree.leaves(w, is_leaf=is_quantized) if is_quantized(node)]
    return found[0] if found else None
