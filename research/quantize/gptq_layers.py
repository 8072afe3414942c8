"""GPTQ over a whole decoder: layer by layer from below, each on inputs that are quantized already.

    windows = calibrate.windows_of(ids, 512, 12)
    params = gptq_layers.quantize(model, params, windows, r"stack_0/.*/kernel", Integer(4, 64))

The mathematics of one matrix is `gptq`'s. Here are its Hessians, H = 2 E[x xᵀ] over all tokens: of each
layer they are those of inputs that have passed the quantized layers below, so that a layer also makes
good what was lost before it (Frantar et al. 2022, arXiv:2210.17323, section 4).

Inside of a layer the matrices that read one input are quantized together, and the next are measured
behind them: q, k, v; then o; then gate, up; then down (`STAGES`; the authors' `--true-sequential`,
which they use for LLaMA). With stages=(".*",) all of a layer are measured before any is quantized,
which is their default and takes a third of the passes. q, k and v read the same numbers, so their
Hessians are equal.

Limits: decoders without a prefix (`layerwise.walk`). At least as many tokens as a matrix has inputs are
asked for: with fewer the Hessian has no inverse, and damping alone would say what it is. The authors
take 128 windows of 2,048.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from research.models.decoder import Decoder
from research.quantize import gptq, layerwise, measures
from research.quantize.layerwise import Layer, Progress, States
from research.quantize.rescale import leaf
from research.types import Array, Params
from research.weights.base import change
from research.weights.formats import Format
from research.weights.observed import Measure
from research.weights.quantized import Quantized, packed, require_dense

# Rules of the matrices of a block, in the order in which data flow through them.
STAGES = (
    r".*/attention/(q|k|v)/kernel",
    r".*/attention/o/kernel",
    r".*/ffn/(gate|up)/kernel",
    r".*/ffn/down/kernel",
)


def quantize(
    model: Decoder,
    params: Params,
    windows: np.ndarray,
    rule: str,
    format: Format,
    damping: float = 0.01,
    act_order: bool = False,
    first: float = 1.0,
    stages: Sequence[str] = STAGES,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Params:
    """Params with every matrix whose path `rule` matches whole in few bits, rounded by `gptq.quantize`.

    windows [n, T] of tokens, without padding; damping and act_order as there; `progress` is called after
    each layer. `first`: how often the first token of a window counts. Models make it a sink that every
    token attends to; its inputs are few and, behind a norm, small, so that they hardly weigh in a
    Hessian, and GPTQ moves its errors just there. RuleError when the rule matches nothing. ValueError, naming the path: for what stands
    outside of layers or in no stage, for what is no dense matrix, for groups that do not fill its
    inputs, for fewer tokens than it has inputs, and for a Hessian that has no inverse.
    """
    names = layerwise.require_inside(model, params, rule)
    for name in names:
        if not any(re.fullmatch(stage, name) for stage in stages):
            raise ValueError(f"{name} is in none of the stages {tuple(stages)}")
    for layer in layerwise.layers_of(model):
        own = layer.own(params)
        for name in _of(layer, names, ".*"):
            _require_fit(name, leaf(own, name), format, windows)

    second = measures.SecondOfWindows(np.shape(windows)[1], first)

    def solve(layer: Layer, own: Params, states: States, _: None) -> Params:
        done: set[str] = set()
        for stage in stages:
            together = [name for name in _of(layer, names, stage) if name not in done]
            if together:
                own = _stage(layer, own, states, together, format, second, damping, act_order)
                done.update(together)
        return own

    return layerwise.walk(model, params, windows, solve, batch_size, progress=progress)


def _of(layer: Layer, names: list[str], stage: str) -> list[str]:
    """Those of the names that stand in the layer and that the stage matches."""
    inside = [name for name in names if name.startswith(f"{layer.path}/")]
    return [name for name in inside if re.fullmatch(stage, name)]


def _require_fit(name: str, w: Array, format: Format, windows: np.ndarray) -> None:
    """ValueError unless w [in, out] of one layer can be quantized on so many tokens."""
    require_dense("GPTQ", name, w)
    try:
        jax.eval_shape(format.scales, w.mT)
    except ValueError as error:
        raise ValueError(f"{name} {w.shape}: {error}") from error
    if np.size(windows) < w.shape[0]:
        raise ValueError(
            f"{name} {w.shape} needs at least as many tokens as it has inputs, {w.shape[0]}; windows "
            f"{np.shape(windows)} have {np.size(windows)}"
        )


def _stage(
    layer: Layer,
    own: Params,
    states: States,
    names: list[str],
    format: Format,
    second: Measure,
    damping: float,
    act_order: bool,
) -> Params:
    """The layer's parameters with the matrices of these names quantized on what they read."""
    rule = "|".join(map(re.escape, names))
    found = layerwise.measure(layer, own, states, rule, second, jnp.add)
    solve = partial(gptq.quantize, format=format, damping=damping, act_order=act_order)

    def encode(name: str, w: Array, number: int) -> Quantized:
        hessian = 2 * found[name]["sum"] / found[name]["rows"]
        try:
            return packed(*solve(w.mT, hessian), format, True)
        except ValueError as error:
            raise ValueError(f"{name} of {layer}: {error}") from error

    return change(own, rule, encode)
