"""Attention as one self-contained HTML page: choose a head, point at a token, see where it looks.

The weights travel in the page as 16-bit integers, base64, of which only the causal triangle is kept
where nothing lies above it: an error of at most 1/131070, less than 1e-5.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.report.page import HERE, document
from research.report.text import escape

FULL = 65535
COLUMNS = {
    "entropy": "nats; 0 looks at one token",
    "distance": "mean distance, tokens",
    "first": "weight on the first token",
    "previous": "on the token before",
    "self": "on the token itself",
    "equal": "on earlier tokens that are equal",
    "induction": "on what followed an earlier equal token",
}


def pack(maps: np.ndarray) -> dict[str, Any]:
    """{"triangle": bool, "codes": base64} of maps [M, T, T] in 0..1, 16 bits little-endian each.

    Row by row; with `triangle` of row i only the columns 0..i. ValueError for other values.
    """
    maps = np.asarray(maps, np.float32)
    if maps.ndim != 3 or maps.shape[1] != maps.shape[2]:
        raise ValueError(f"maps must be [M, T, T], not {maps.shape}")
    # Rounding may take a sum of probabilities a little past 1.
    if not np.all((maps >= 0) & (maps <= 1 + 1e-5)):
        raise ValueError("attention weights must be in 0..1")
    codes = np.rint(np.minimum(maps, 1) * FULL).astype("<u2")
    triangle = not np.triu(maps, 1).any()
    kept = codes[:, *np.tril_indices(maps.shape[1])] if triangle else codes
    return {"triangle": triangle, "codes": base64.b64encode(kept.tobytes()).decode()}


def unpack(packed: Mapping[str, Any], count: int, T: int) -> np.ndarray:
    """The inverse of `pack`, as the page's script does it: maps [count, T, T] float32."""
    codes = np.frombuffer(base64.b64decode(packed["codes"]), "<u2").astype(np.float32) / FULL
    if not packed["triangle"]:
        return codes.reshape(count, T, T)
    maps = np.zeros((count, T, T), np.float32)
    maps[:, *np.tril_indices(T)] = codes.reshape(count, -1)
    return maps


def render_attention(
    weights: np.ndarray,
    tokens: Sequence[str],
    statistics: Mapping[str, np.ndarray],
    rollout: np.ndarray,
    title: str,
    facts: Sequence[str] = (),
) -> str:
    """One HTML document.

    weights     [L, N, T, T], rows the tokens that look       tokens   T labels to show
    statistics  {name: [L, N]}, nan where there is none       rollout  [L, T, T]
    title       the heading                                   facts    short remarks under it

    ValueError when shapes do not fit each other or values are not weights.
    """
    weights, rollout = np.asarray(weights), np.asarray(rollout)
    L, N, T = weights.shape[:3]
    if len(tokens) != T:
        raise ValueError(f"weights of {T} tokens need {T} labels, not {len(tokens)}")
    if rollout.shape != (L, T, T):
        raise ValueError(f"rollout must be {(L, T, T)}, not {rollout.shape}")
    for name, values in statistics.items():
        if np.shape(values) != (L, N):
            raise ValueError(f"statistics[{name!r}] must be {(L, N)}, not {np.shape(values)}")
    # A layer's maps: its heads, their average, and the rollout up to it.
    maps = np.concatenate([weights, weights.mean(1, keepdims=True), rollout[:, None]], 1)
    data = {
        "layers": L,
        "heads": N,
        "tokens": list(tokens),
        "statistics": {name: _rows(values) for name, values in statistics.items()},
        **pack(maps.reshape(-1, T, T)),
    }
    return document(
        title,
        _body(title, [*facts, f"{L} layers × {N} heads", f"{T} tokens"], statistics, data),
        style=(HERE / "page.css").read_text() + (HERE / "attention.css").read_text(),
        script=(HERE / "attention.js").read_text(),
    )


def _rows(values: np.ndarray) -> list[list[float | None]]:
    """Six digits are what the page may show; JSON has no nan."""
    rows = np.asarray(values, float).tolist()
    return [[float(f"{x:.6g}") if math.isfinite(x) else None for x in row] for row in rows]


def _body(title: str, facts: Sequence[str], names: Mapping, data: dict) -> str:
    meta = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    # No '<' in the data: a token may be '</script>'.
    script = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    heads = "".join(
        f'<th scope="col"><button type="button" data-column="{escape(name)}">{escape(name)}'
        "</button></th>"
        for name in ("layer", "head", *names)
    )
    meaning = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(COLUMNS.get(name, ''))}</dd>" for name in names
    )
    page = (HERE / "attention.html").read_text()
    parts = {"title": escape(title), "meta": meta, "columns": heads, "meaning": meaning}
    for name, part in {**parts, "data": script}.items():
        page = page.replace(f"<!-- {name} -->", part)
    return page
