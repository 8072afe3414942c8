"""How few bits may a key/value cache have?  Liu et al. 2024, KIVI (arXiv:2402.02750), Tables 1 and 2.

SmolLM2-135M-Instruct (the Q4_1 release made dense) reads held-out text through a cache whose keys and
values are in few bits (`models.storage`): what every token attends to, itself included, is what the cache
gives back. Measured are perplexity, the divergence from the model without a cache, the bytes of the
cache's arrays a token, and the seconds of one decoded token behind a long context. KIVI says that keys
have channels that are large for all tokens, so that keys need scales a channel, while values do with two
bits and scales a token. So keys and values are varied apart, and both are also rounded along their
channels, over groups of tokens: the error of what is kept can be compared though this cache has scales a
token only.

Differs from the paper: keys have scales a token and head, after rotation, and no recent tokens in full
precision; 135M parameters with 3 heads of 64; windows of 512 tokens and no task of a long context. Bytes
are against float32, which the CPU computes in; against 16 bits every saving is half as large.
Run:    python -m experiments.kv_cache_bits --sweep           (11 runs, 15 min beside other work)
Expect: as KIVI says of scales a token: keys are the weak side. With 8 bits for the other half, values cost 0.02
        nats in 4 bits, 0.04 in 3 and 0.18 in 2; keys 0.24 in 4, 0.22 in 3 (groups of 32) and 1.7 in 2. 8 bits are
        free; 4 bits a head cost 0.26, in groups of 16 0.06. Of keys the error would be less than half as large
        with scales a channel, of values it would not. A token in int8 or int4 takes as long as in float32, with
        groups or NF4 twice as long.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.shared import few_bits, kept_cache
from experiments.shared.cells import cells, markdown
from experiments.shared.few_bits import Text
from experiments.shared.first_layers import smollm2_layers
from research.decode.generate import for_decoding
from research.runs import main, param, results
from research.types import Params
from research.weights.formats import Codebook, Format, Integer


@dataclasses.dataclass(frozen=True)
class Kept:
    """Formats of keys and values, None: as they are. Scales are float16."""

    keys: Format | None = None
    values: Format | None = None


INT8, INT4 = Integer(8, "row"), Integer(4, "row")
INT3, INT2 = (Integer(bits, 32, "minimum") for bits in (3, 2))  # as KIVI: least and largest exact
KINDS = {
    "float32": Kept(),
    "int8": Kept(INT8, INT8),
    "int4": Kept(INT4, INT4),
    "int4, groups of 16": Kept(*[Integer(4, 16)] * 2),
    "NF4": Kept(*[Codebook("NF4", "row")] * 2),
    "keys int8, values int4": Kept(INT8, INT4),
    "keys int4, values int8": Kept(INT4, INT8),
    "keys int8, values int3": Kept(INT8, INT3),
    "keys int3, values int8": Kept(INT3, INT8),
    "keys int8, values int2": Kept(INT8, INT2),
    "keys int2, values int8": Kept(INT2, INT8),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A token is decoded behind `context` others, `decoded` times. `layers`: the first so many alone,
    which are no language model."""

    kept: Kept = Kept()
    text: Text = Text(calibration=1)
    context: int = 1024
    decoded: int = 12
    layers: int | None = None
    seed: int = 0


@cache
def in_layers(layers: int | None) -> Params:
    return for_decoding(smollm2_layers(layers).params)


def run(config: Config, directory: Path) -> dict[str, float]:
    base, kept = smollm2_layers(config.layers), config.kept
    windows = few_bits.read(config.text).held_out
    model = kept_cache.with_storage(base.model, kept.keys, kept.values)
    row = few_bits.summary(kept_cache.compare(base.model, model, base.params, windows))
    keys, values = kept_cache.keys_and_values(base.model, base.params, jnp.asarray(windows[:2]))
    numbers = (keys.size + values.size) / windows[:2].size
    row["bytes_per_token"] = kept_cache.bytes_per_token(model)
    row["bits_per_number"] = 8 * row["bytes_per_token"] / numbers
    for name, x, format in (("key", keys, kept.keys), ("value", values, kept.values)):
        row[f"{name}_error"], row[f"{name}_error_channels"] = kept_cache.errors(x, format)
        row[f"{name}_outliers"] = kept_cache.channel_outliers(x)
    layers = in_layers(config.layers)
    row["s_per_token"] = kept_cache.seconds_per_token(model, layers, config.context, config.decoded)
    return row


def variants(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, kept=KINDS).items()}


HEADS = ["cache", "bytes a token", "bits a number", "perplexity", "rise, %", "KL, nats"]
HEADS += ["error of keys", "along channels", "error of values", "along channels", "ms a token"]
NOTE = """
Perplexity of held-out windows read through the cache, {full:.4g} without one; its rise paired by window
± standard error over windows. Error: relative, of what is kept; along channels: were the scales those of
a channel over the tokens. The largest channel is {keys:.3g} times the median one in keys, {values:.3g} times in
values (median of layers and heads). ms: one token behind {context} others, taken beside other work.
"""


def table(rows: list[results.Row]) -> str:
    found, lines = variants(rows), []
    for name, group in found.items():
        shown = results.metrics(group.rows[0])
        rise, error = few_bits.percent(shown)
        line = [name, f"{shown['bytes_per_token']:,.0f}", f"{shown['bits_per_number']:.2f}"]
        line += [group.statistic("perplexity"), f"{rise:.3g} ± {error:.2g}"]
        line.append(f"{shown['divergence']:.2g}")
        for kind in ("key", "value"):
            line += [f"{shown[f'{kind}_error{along}']:.3f}" for along in ("", "_channels")]
        lines.append([*line, f"{1000 * shown['s_per_token']:.0f}"])
    one = next(iter(found.values()))
    of = {name: one.statistic(f"{name}_outliers").mean for name in ("key", "value")}
    full = one.statistic("full_perplexity").mean
    note = NOTE.format(full=full, keys=of["key"], values=of["value"], context=BASE.context)
    return markdown(HEADS, lines) + note


def figure(rows: list[results.Row]) -> Figure:
    """Divergence against bytes a token; the error of what is rounded, a token's and a channel's scales."""
    found = variants(rows)
    drawing = Figure(figsize=(11, 4), layout="constrained")
    costs, kept = drawing.subplots(1, 2)
    for number, (name, group) in enumerate(found.items()):
        if name == "float32":
            continue
        divergence, error = (group.statistic(n).mean for n in ("divergence", "divergence_se"))
        place = group.statistic("bytes_per_token").mean
        marker = "os^"[number % 3]
        costs.errorbar(place, divergence, error, fmt=marker, capsize=3, label=name)
    costs.set(yscale="log", xlabel="bytes a token", ylabel="KL from the full cache, nats a token")
    costs.grid(alpha=0.25)
    costs.legend(frameon=False, fontsize=7)
    for kind, marker in (("key", "o"), ("value", "s")):
        points = [
            [g.statistic(f"{kind}_error{a}").mean for a in ("", "_channels")]
            for g in found.values()
        ]
        points = np.asarray([point for point in points if point[0]]).reshape(-1, 2)
        kept.plot(*points.T, marker, label=f"{kind}s")
    low, high = kept.get_xlim()
    kept.plot([max(low, 0), high], [max(low, 0), high], color="grey", linewidth=0.8)
    kept.set(xlabel="relative error, scales a token", ylabel="relative error, scales a channel")
    kept.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = param("kept", *KINDS.values())
SMOKE = {
    "layers": 1,
    "context": 8,
    "decoded": 1,
    "text.length": 40,
    "text.held_out": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
