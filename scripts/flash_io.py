"""What attention moves, by length and by tile: the picture of docs/FLASH_ATTENTION.md.

    python -m scripts.flash_io [--output docs/images/flash_io.svg]

Counted from the kernels' programs (`research.kernels.traffic`), causal, 16-bit inputs; no GPU needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from research.kernels.flash1 import flash1
from research.kernels.flash2 import flash2
from research.kernels.flash_tiles import FlashTiles, flash_tiles
from research.kernels.mask import Mask
from research.kernels.traffic import Cost, Shape, count, plain
from research.kernels.triton import Tile
from research.runs.environment import ROOT
from scripts.plot import save

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
TILES = (16, 32, 64, 128, 256)
HEADS, H = 12, 64


def total(costs: dict[str, Cost]) -> Cost:
    return sum(costs.values(), Cost())


def by_length() -> dict[str, list[float]]:
    """GB of a forward and backward pass of one row, for every length."""
    tiles = flash_tiles(H, "bfloat16", "H100")
    lines: dict[str, list[float]] = {name: [] for name in ("plain", "flash1", "flash2", "arrays")}
    for T in LENGTHS:
        shape = Shape(1, T, T, HEADS, HEADS, H)
        one, two = (total(count(kernel, shape, Mask(), tiles)) for kernel in (flash1, flash2))
        for name, value in zip(
            lines, (plain(shape).moved, one.moved, two.moved, two.arrays), strict=True
        ):
            lines[name].append(value / 1e9)
    return lines


def by_tile() -> dict[str, list[float]]:
    """GB of forward passes over 4,096 tokens, for square tiles."""
    shape, lines = Shape(1, 4096, 4096, HEADS, HEADS, H), {"flash1": [], "flash2": []}
    for size in TILES:
        tiles = FlashTiles(*(Tile(size, size) for _ in range(3)))
        for kernel in (flash1, flash2):
            forward = count(kernel, shape, Mask(), tiles)[f"{kernel.__name__}_forward"]
            lines[kernel.__name__].append(forward.moved / 1e9)
    return lines


def figure() -> Figure:
    canvas = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for name, values in by_length().items():
        style = "--" if name == "arrays" else "-"
        label = "flash2, each array once" if name == "arrays" else name
        left.plot(LENGTHS, values, style, marker="o", markersize=3, label=label)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="GB moved, forward and backward")
    left.set_xticks(LENGTHS, [str(T) for T in LENGTHS], fontsize=7)
    for name, values in by_tile().items():
        right.plot(TILES, values, marker="o", markersize=3, label=name)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="tile, queries and keys",
        ylabel="GB moved, forward, 4,096 tokens",
    )
    right.set_xticks(TILES, [str(size) for size in TILES])
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8, frameon=False)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.flash_io", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "flash_io.svg")
    options = parser.parse_args()
    save(figure(), options.output)
    print(f"written to {options.output}")
    for name, values in (*by_length().items(), *by_tile().items()):
        print(name, *(f"{value:.3g}" for value in values))


if __name__ == "__main__":
    main()
