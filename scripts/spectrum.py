"""What fine-tuning did to the matrices: spectra of ΔW, and how alike two updates are.

    python -m scripts.spectrum BASE UPDATE [OTHER] [--rule REGEX] [--rank 8] [--side in|out]

BASE is 'smollm2', a model directory or a .gguf file; UPDATE and OTHER are LoRA adapters or tuned
models (directories). Written to --out: singular values by matrix and layer, effective rank by layer
and matrix, with OTHER the similarity of their subspaces, and all numbers as Markdown tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.shared.cells import markdown
from research import hub
from research.evaluate import spectrum
from research.evaluate.spectrum import Spectrum
from research.hub.download import DownloadError, smollm2
from research.hub.peft_config import CONFIG as ADAPTER
from research.runs.environment import ROOT
from research.types import Params
from scripts.plot import save

SHARE = 0.9  # of the energy, for the rank that holds it
MOST = 64  # directions of a similarity's map
Found = dict[str, Spectrum]  # by path
HEADS = ["matrix", "layer", "‖ΔW‖", "‖ΔW‖ / ‖W‖", "σ1", "effective rank", "stable rank"]
HEADS += [f"rank of {SHARE:.0%}", "amplification"]


def open_update(base: hub.Pretrained, path: str, rule: str) -> Found:
    """Spectra of what the adapter or model at `path` changed; ValueError naming it when nothing did."""
    if (Path(path) / ADAPTER).exists():
        params = hub.load_adapter(base, path).params
    else:
        params = hub.load(path).params
    try:
        found = spectrum.spectra(base.params, params, rule)
    except ValueError as error:
        raise ValueError(f"{path} does not belong to the base: {error}") from error
    if not found:
        raise ValueError(f"{path}: no matrix that {rule!r} matches differs from the base's")
    return found


def numbers(one: Spectrum, weight: Any, rank: int) -> np.ndarray:
    """[L, 7], the columns of HEADS after the layer; L is 1 for a matrix that stands alone."""
    rank = min(rank, one.values.shape[-1])
    against = spectrum.amplification(one, weight, rank)
    size = spectrum.approximation_error(one.values)[..., 0]
    columns = (
        size,
        size / against.weight,
        one.values[..., 0],
        spectrum.effective_rank(one.values),
        spectrum.stable_rank(one.values),
        spectrum.rank_for(one.values, SHARE),
        against.factor,
    )
    return np.stack([np.atleast_1d(np.asarray(column)) for column in columns], -1)


def lines(found: dict[str, np.ndarray]) -> list[list[str]]:
    """A line for every matrix of every layer, before them their mean."""
    shown = []
    for path, values in found.items():
        means = [np.nanmean(values, 0)] if len(values) > 1 else []
        layers = ["mean"] * len(means) + ([*map(str, range(len(values)))] if means else ["–"])
        for layer, row in zip(layers, [*means, *values], strict=True):
            shown.append([path, layer, *(f"{value:.3g}" for value in row)])
    return shown


def short(path: str, found: Found) -> str:
    """'attention/q', where all is of one kind of block."""
    stems = {p.partition("/attention/")[0] for p in found if "/attention/" in p}
    stems |= {p.partition("/ffn/")[0] for p in found if "/ffn/" in p}
    name = path.removeprefix(f"{next(iter(stems))}/") if len(stems) == 1 else path
    return name.removesuffix("/kernel").removesuffix("/table")


def panels(count: int, size: float = 2.6) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(size * columns + 1.2, size * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def draw_values(found: Found, title: str) -> Figure:
    """A panel a matrix, a line a layer."""
    figure, axes = panels(len(found))
    most = max(one.values.shape[0] if one.values.ndim > 1 else 1 for one in found.values())
    shade = ScalarMappable(Normalize(0, max(most - 1, 1)), colormaps["viridis"])
    for axis, (path, one) in zip(axes, found.items(), strict=True):
        for layer, values in enumerate(np.atleast_2d(np.asarray(one.values))):
            values = np.where(values > 0, values, np.nan)
            index = np.arange(1, len(values) + 1)
            mark = "." if len(values) <= 32 else ""
            axis.semilogy(index, values, mark + "-", color=shade.to_rgba(layer), linewidth=0.9)
        axis.set_title(short(path, found), fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.25)
    figure.supxlabel("index", fontsize=9)
    figure.supylabel("singular value of ΔW", fontsize=9)
    figure.suptitle(title, fontsize=9)
    if most > 1:
        figure.colorbar(shade, ax=axes, label="layer", aspect=30)
    return figure


def draw_layers(columns: dict[str, np.ndarray], title: str, label: str, top: float) -> Figure:
    """A heat map of {name of a matrix: [L]}, layers down; `top` is the end of the scale."""
    rows = max(map(len, columns.values()))
    sheet = np.full((rows, len(columns)), np.nan)
    for place, values in enumerate(columns.values()):
        sheet[: len(values), place] = values
    figure = Figure(figsize=(0.75 * len(columns) + 2.4, 0.26 * rows + 1.8), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(sheet, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    for (layer, place), value in np.ndenumerate(sheet):
        if np.isfinite(value):
            ink = "black" if value > 0.6 * top else "white"
            axis.text(place, layer, f"{value:.3g}", ha="center", va="center", fontsize=7, color=ink)
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(rows), range(rows), fontsize=7)
    axis.set_ylabel("layer")
    axis.set_title(title, fontsize=9)
    figure.colorbar(picture, label=label)
    return figure


def similarities(one: Found, other: Found, side: str) -> dict[str, np.ndarray]:
    """φ [L, I, J] of the matrices that both changed; ValueError when there is none."""
    shared = [path for path in one if path in other]
    if not shared:
        names = (", ".join([*found][:4]) for found in (one, other))
        raise ValueError("the updates share no matrix: one has {}; the other {}".format(*names))
    found = {}
    for path in shared:
        u, v = (spectrum.directions(each[path], side, MOST) for each in (one, other))
        phi = spectrum.subspace_similarity(u, v)
        found[path] = np.asarray(phi if phi.ndim == 3 else phi[None])
    return found


def draw_similarity(phi: dict[str, np.ndarray], names: Sequence[str], title: str) -> Figure:
    """A panel a matrix, φ(i, j) as a mean over the layers that have i and j directions."""
    figure, axes = panels(len(phi))
    for axis, (path, maps) in zip(axes, phi.items(), strict=True):
        count = np.isfinite(maps).sum(0)
        mean = np.where(count > 0, np.nansum(maps, 0) / np.maximum(count, 1), np.nan)
        I, J = mean.shape
        reach = (0.5, J + 0.5, 0.5, I + 0.5)
        picture = axis.imshow(mean, vmin=0, vmax=1, origin="lower", extent=reach, aspect="auto")
        axis.set_title(short(path, dict.fromkeys(phi)), fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=7)
    figure.supylabel(f"i, directions of {names[0]}", fontsize=9)
    figure.supxlabel(f"j, directions of {names[1]}", fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.colorbar(picture, ax=axes, label="φ(i, j)", aspect=30)
    return figure


def report(
    base: Params, updates: dict[str, Found], rank: int, phi: dict[str, np.ndarray]
) -> tuple[str, str]:
    """(all tables, the same without single layers), Markdown."""
    weights, long, brief = spectrum.matrices(base), [], []
    for name, found in updates.items():
        each = {path: numbers(one, weights[path], rank) for path, one in found.items()}
        shown = lines(each)
        heading = f"## {name}\n\n"
        long.append(heading + markdown(HEADS, shown))
        brief.append(heading + markdown(HEADS, [line for line in shown if not line[1].isdigit()]))
    if phi:
        sizes = {path: spectrum_size(updates, path) for path in phi}
        rows = [similarity_line(path, maps, rank, sizes[path]) for path, maps in phi.items()]
        heads = ["matrix", "directions", "φ, mean of layers", "least", "most", "in", "out"]
        table = "## similarity\n\n" + markdown(heads, rows)
        long.append(table)
        brief.append(table)
    note = f"\namplification: ‖ΔW_r‖ / ‖Uᵀ W V‖ in the first r = {rank} directions, or all there are.\n"
    return "\n".join(long) + note, "\n".join(brief) + note


def spectrum_size(updates: dict[str, Found], path: str) -> tuple[int, int]:
    one = next(iter(updates.values()))[path]
    return one.left.shape[-2], one.right.shape[-2]


def at_rank(maps: np.ndarray, rank: int) -> np.ndarray:
    """φ(r, r) of each layer, r as far as both updates go."""
    r = min(rank, *maps.shape[-2:])
    return maps[:, r - 1, r - 1]


def similarity_line(path: str, maps: np.ndarray, rank: int, size: tuple[int, int]) -> list[str]:
    r, values = min(rank, *maps.shape[-2:]), at_rank(maps, rank)
    found = values[np.isfinite(values)]
    told = [f"{f(found):.3g}" if found.size else "–" for f in (np.mean, np.min, np.max)]
    chance = [f"{spectrum.random_similarity(r, r, n):.3g}" for n in size]
    return [path, str(r), *told, *chance]


def arguments(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.spectrum",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", help="'smollm2', a model directory or a .gguf file")
    parser.add_argument("update", help="an adapter or a tuned model, a directory")
    parser.add_argument("other", nargs="?", help="another one of the same base")
    parser.add_argument("--rule", default=r".*", help="paths of the matrices, all by default")
    parser.add_argument("--rank", type=int, default=8, help="directions compared in the tables")
    parser.add_argument("--side", choices=("in", "out"), default="in", help="what is read, written")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/spectrum")
    options = parser.parse_args(argv)
    if options.rank < 1:
        parser.error(f"--rank must be at least 1, not {options.rank}")
    return options


def figures(updates: dict[str, Found], phi: dict[str, np.ndarray], rank: int, side: str) -> dict:
    """{name of the file: figure}; maps by layer where a matrix has layers."""
    made = {}
    for number, (name, found) in enumerate(updates.items(), start=1):
        suffix = f"_{number}" if len(updates) > 1 else ""
        made[f"values{suffix}"] = draw_values(found, f"singular values of ΔW, {name}")
        columns = {
            short(path, found): np.asarray(spectrum.effective_rank(one.values))
            for path, one in found.items()
            if one.values.ndim > 1
        }
        if columns:
            top = max(values.max() for values in columns.values())
            made[f"rank{suffix}"] = draw_layers(columns, name, "effective rank of ΔW", top)
    if phi:
        title = f"similarity of subspaces, what is {'read' if side == 'in' else 'written'}"
        made["similarity"] = draw_similarity(phi, list(updates), title)
        columns = {short(p, phi): at_rank(maps, rank) for p, maps in phi.items() if len(maps) > 1}
        if columns:
            made["similarity_layers"] = draw_layers(columns, title, f"φ({rank}, {rank})", 1.0)
    return made


def label(path: str, taken: Sequence[str]) -> str:
    """The directory's name, or where it lies besides when another has the same."""
    name = Path(path).resolve().name
    return path if name in taken else name


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        base = hub.load(smollm2() if options.base == "smollm2" else options.base)
        updates: dict[str, Found] = {}
        for path in filter(None, (options.update, options.other)):
            updates[label(path, list(updates))] = open_update(base, path, options.rule)
        phi = similarities(*updates.values(), options.side) if len(updates) == 2 else {}
        long, brief = report(base.params, updates, options.rank, phi)
        options.out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(updates, phi, options.rank, options.side).items():
            save(figure, options.out / f"{name}.{options.format}")
        (options.out / "spectrum.md").write_text(long)
    except (ValueError, OSError, DownloadError) as error:
        print(f"spectrum: {error}", file=sys.stderr)
        return 1
    print(f"{brief}\nwritten to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
