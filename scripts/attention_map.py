"""Where a model's heads look, as one HTML page to click through and a picture of all heads.

    python -m scripts.attention_map --text "..." [--model smollm2|DIR|GGUF] [--out FILE.html]

The page needs no network and no other file; the picture lies beside it (FILE.png).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from research import hub
from research.compiled import keep_compiled
from research.evaluate import attention
from research.hub import Pretrained
from research.hub.download import DownloadError, smollm2
from research.report.attention import render_attention
from research.report.page import put
from research.runs.environment import ROOT
from research.tokenize.labels import encode_with_labels
from scripts.plot import save


def page(pretrained: Pretrained, name: str, text: str, most: int) -> tuple[str, np.ndarray]:
    """(the HTML document, weights [L, N, T, T]); ValueError when the text cannot be shown."""
    if pretrained.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer")
    ids, labels = encode_with_labels(pretrained.tokenizer, text)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; two or more can look at each other")
    if len(ids) > most:
        raise ValueError(
            f"the text has {len(ids)} tokens, more than {most}: shorten it or raise --max-tokens "
            f"(the page grows with their square)"
        )
    longest = pretrained.model.config.max_length
    if len(ids) > longest:
        raise ValueError(f"the text has {len(ids)} tokens, the model reads at most {longest}")
    weights, logits = attention.capture(pretrained.model, pretrained.params, jnp.asarray(ids))
    if not np.isfinite(logits).all():
        raise ValueError(f"{name} gives logits that are not finite")
    found = attention.statistics(weights, jnp.asarray(ids))
    rollout = attention.rollout(weights)
    title = text if len(text) <= 80 else text[:79] + "…"
    weights = np.asarray(weights)
    return render_attention(weights, labels, found, rollout, title, [name]), weights


def draw(weights: np.ndarray, name: str) -> Figure:
    """All maps [L, N, T, T] side by side, a layer a row; shades by the root of the weight."""
    L, N, T = weights.shape[:3]
    gap = max(1, T // 12)
    sheet = np.full((L * (T + gap), N * (T + gap)), np.nan, np.float32)
    hidden = ~np.tri(T, dtype=bool)
    for (layer, head), one in zip(np.ndindex(L, N), weights.reshape(-1, T, T), strict=True):
        at, across = layer * (T + gap), head * (T + gap)
        shown = one if one[hidden].any() else np.where(hidden, np.nan, one)
        sheet[at : at + T, across : across + T] = shown
    figure = Figure(figsize=(0.55 * N + 1.6, 0.55 * L + 1), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(sheet, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axis.set_xticks([(T + gap) * n + T / 2 for n in range(N)], range(N), fontsize=8)
    axis.set_yticks([(T + gap) * n + T / 2 for n in range(L)], range(L), fontsize=8)
    axis.set(xlabel="head", ylabel="layer")
    axis.set_title(name, fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(picture, label="attention weight", shrink=min(1, 8 / L), aspect=30)
    return figure


def arguments(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.attention_map",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", required=True, help="what the model reads")
    parser.add_argument(
        "--model",
        default="smollm2",
        help="'smollm2' (the default), a model directory or a .gguf file",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/attention.html")
    parser.add_argument("--max-tokens", type=int, default=64, help="refuse longer texts")
    options = parser.parse_args(argv)
    if options.out.suffix != ".html":
        parser.error(f"--out must end in .html, not {str(options.out)!r}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    keep_compiled()
    name = "SmolLM2-135M-Instruct" if options.model == "smollm2" else Path(options.model).name
    try:
        pretrained = hub.load(smollm2() if options.model == "smollm2" else options.model)
        document, weights = page(pretrained, name, options.text, options.max_tokens)
        path = put(options.out, document)
        save(draw(weights, name), path.with_suffix(".png"))
    except (ValueError, OSError, DownloadError) as error:
        print(f"attention_map: {error}", file=sys.stderr)
        return 1
    print(f"written to {path} and {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
