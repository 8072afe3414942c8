"""Outliers of a decoder's inputs and matrices: the largest channel over the median one, layer by layer.

What one scale cannot serve (Dettmers et al. 2022, arXiv:2208.07339). Statistics are the largest
magnitudes {kernel: [L, in]} of `calibrate.measure` with `measures.absmax`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from research.evaluate import quantization
from research.quantize.calibrate import Statistics
from research.quantize.rescale import leaf
from research.types import Params


def of_inputs(absmax: Statistics) -> dict[str, np.ndarray]:
    """{'ffn/down': [L]}: largest over median of the features' magnitudes."""
    return {short(name): quantization.outliers(absmax[name]) for name in absmax}


def of_matrices(params: Params, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The same of the rows of these matrices, each by its largest magnitude."""
    rows = {name: jnp.abs(leaf(params, name)).max(axis=-1) for name in names}
    return {short(name): quantization.outliers(row) for name, row in rows.items()}


def short(name: str) -> str:
    """'ffn/down' of 'stack_0/block_0/ffn/down/kernel'."""
    return "/".join(name.split("/")[-3:-1])


def metrics_of(ratios: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a row keeps: of each matrix's inputs the largest ratio, and the layer that has it."""
    found = {f"outlier/{name}": float(each.max()) for name, each in ratios.items()}
    return found | {f"outlier_layer/{name}": float(each.argmax()) for name, each in ratios.items()}


def worst(row: Mapping[str, float]) -> tuple[float, str]:
    """Of a row's metrics the largest ratio, and whose it is: 'ffn/down, layer 3'."""
    ratios = {n: x for name, x in row.items() if (n := name.removeprefix("outlier/")) != name}
    name = max(ratios, key=ratios.get)
    return ratios[name], f"{name}, layer {row[f'outlier_layer/{name}']:.0f}"


def picture(inputs: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> Figure:
    """Outlier ratios of every layer, {matrix: [L]}, of the inputs and of the matrices that read them."""
    drawing = Figure(figsize=(9, 3.4), layout="constrained")
    panels = zip(drawing.subplots(1, 2), (inputs, weights), ("inputs of", "rows of"), strict=True)
    for axes, ratios, of in panels:
        for name, each in ratios.items():
            axes.plot(each, marker=".", label=f"{of} {name}")
        axes.set(yscale="log", xlabel="layer", ylabel="largest over median channel")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return drawing
