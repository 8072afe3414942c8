"""What does flash attention spare QLoRA?  QLoRA (Dettmers et al. 2023, arXiv:2305.14314) with
FlashAttention-2 (Dao 2023, arXiv:2307.08691).

SmolLM2-135M-Instruct is fine-tuned as `qlora` does it (NF4 with double quantization, LoRA on every
matrix of a block, 8-bit Adam, layers computed again in the backward pass), once with the attention
that builds the T×S scores and once in tiles, on rows of 256 to 2048 tokens. A step sees 2048
tokens throughout, so that everything but the scores keeps its size: they are tokens × T numbers a head.
Both kernels see the same real rows (English Alpaca through the chat template, packed to T). Measured are
the compiled step's memory, with layers computed again and with all activations kept, the seconds of a
step, and every step's loss, which must not depend on the kernel.

Differs from the papers: a CPU, where the flash form is `blockwise` in plain JAX and time is arithmetic
rather than traffic with memory; float32; 135M parameters. Rows are packed from short conversations, and
tiles between two of them are passed over, which the plain form cannot do: `seen` is the share of the
T×T scores that a row needs. So two more runs have rows of one text (an encyclopedia's), where it is half.
Rows of different T hold different batches, so that losses compare between kernels alone.
Run:    bash scripts/cpu.sh .venv/bin/python -m experiments.qlora_flash --sweep       (10 runs, about 25 min)
        `--set kernel=flash2` on a GPU; any kernel of `research.kernels.select` that has gradients.
Expect: temporaries in tiles are 0.4 GB at every T, 4.0 with all activations kept; those of the plain form
        grow from 0.45 to 0.88 and from 5.6 to 18 GB. Computing layers again spares more than tiles do, and
        hides most of what they spare. Losses are equal within 1e-6. A step in tiles takes no longer with T, a
        plain one three times as long; with one text in a row the gain is smaller than with packed rows (3.4 and
        4.7 times at 2048 tokens).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.shared import sft
from experiments.shared.cells import cells, markdown
from experiments.shared.few_bits_tuning import (
    QLORA,
    Way,
    costs,
    median_seconds,
    optimizer_of,
    prepared,
    seconds,
    tune,
)
from experiments.shared.first_layers import smollm2_instruct, smollm2_layers
from research.data import corpora, formats, packing, source
from research.kernels.select import KERNELS, kernel
from research.models.decoder import Decoder
from research.runs import chain, main, param, product, results
from research.tokenize import chat
from research.types import Params

LENGTHS = (256, 512, 1024, 2048)


@cache
def conversations(length: int) -> packing.Table:
    """All of them in packed rows; what one has beyond `length` tokens is cut off."""
    encode = partial(chat.encode_chat, smollm2_instruct().tokenizer)
    return sft.packed(list(formats.conversations(corpora.alpaca_en())), encode, length)


@cache
def one_text(length: int) -> packing.Table:
    """Windows of an encyclopedia, in which every token sees all that stand before it."""
    stream = np.asarray(smollm2_instruct().tokenizer.encode(corpora.wiki()))
    count = packing.windows(len(stream), length)
    rows = [packing.stream_row(stream, index, length) for index in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in packing.FIELDS}


@dataclasses.dataclass(frozen=True)
class Config:
    """A step sees `tokens` in rows of `length`, through the attention kernel of that name.

    text      from a length to packed rows
    layers    None is the whole model
    """

    kernel: str = "blockwise"
    length: int = 2048
    text: Callable[[int], packing.Table] = conversations
    tokens: int = 2048
    way: Way = QLORA
    warmup_steps: int = 1
    steps: int = 4
    layers: int | None = None
    seed: int = 0

    def __post_init__(self):
        kernel(self.kernel)  # ValueError for a name that is none
        if self.tokens % self.length:
            raise ValueError(f"{self.tokens} tokens are no whole rows of {self.length}")

    @property
    def batch_size(self) -> int:
        return self.tokens // self.length


def with_kernel(model: Decoder, name: str) -> Decoder:
    return model.clone(config=dataclasses.replace(model.config, attend=kernel(name)))


def seen(table: packing.Table) -> float:
    """The share of the T×T scores of a row that are of a token and one before it in its own text."""
    ids = table["segment_ids"]
    counts = [np.unique(row[row != 0], return_counts=True)[1] for row in ids]
    return sum(int((n * (n + 1) // 2).sum()) for n in counts) / (ids.size * ids.shape[1])


def run(config: Config, directory: Path) -> dict[str, float]:
    base = smollm2_layers(config.layers)
    return measured(base.model, base.params, config.text(config.length), config, directory)


def measured(
    model: Decoder, params: Params, table: packing.Table, config: Config, directory: Path
) -> dict[str, float]:
    """What the step costs as compiled, and the losses and times of `config.steps` of it."""
    model, way = with_kernel(model, config.kernel), config.way
    start, rule = prepared(way, params, config.seed)
    batch = source.supervised_batch(table, config.batch_size, config.seed, 0)
    memory = costs(model, start, rule, optimizer_of(way, config), batch)
    _, steps = tune(model, way, start, rule, table, config, directory)
    found = {"seen": seen(table)} | {f"cost/{name}": value for name, value in memory.items()}
    found |= {f"loss/{row['step']}": row["loss"] for row in steps}
    return found | {"s_per_step": median_seconds(steps), "s_fastest": min(seconds(steps))}


def by_shape(rows: list[results.Row]) -> dict[tuple[str, int, str], results.Group]:
    """{(text, length, kernel): runs}, whatever kernels have rows."""
    lengths, kernels = {n: n for n in LENGTHS}, {name: name for name in KERNELS}
    return cells(rows, BASE, text=TEXTS, length=lengths, kernel=kernels)


def losses(group: results.Group) -> np.ndarray:
    """Each step's, of several seeds their mean."""
    count = sum(name.startswith("loss/") for name in results.metrics(group.rows[0]))
    return np.array([group.statistic(f"loss/{step}").mean for step in range(1, count + 1)])


def difference(group: results.Group, plain: results.Group) -> float:
    """The largest of any step between the losses of two kernels."""
    return float(np.abs(losses(group) - losses(plain)).max())


HEADS = ["rows of", "tokens", "kernel", "seen", "temporaries MB", "peak MB", "all kept MB"]
HEADS += ["s a step", "fastest", "first loss", "last", "largest difference"]
NOTE = """
Temporaries of the compiled step with layers computed again, and with all activations kept; peak: arguments
besides, layers computed again. Seconds: median of the steps after the first. Seen: of the T×T scores, those
that packed rows need. Losses in nats a token; difference: over all {steps} steps, from the plain kernel.
"""


def line(
    text: str, length: int, name: str, group: results.Group, plain: results.Group | None
) -> list[str]:
    def shown(key: str, form: str, unit: float = 1) -> str:
        return format(group.statistic(key).mean / unit, form)

    memory = [
        shown(f"cost/{key}_bytes", ",.0f", 1e6)
        for key in ("again/temporary", "again/peak", "kept/temporary")
    ]
    times = [shown(key, ".1f") for key in ("s_per_step", "s_fastest")]
    first, *_, last = losses(group)
    apart = "–" if plain in (None, group) else f"{difference(group, plain):.1g}"
    ends = [f"{first:.4f}", f"{last:.4f}", apart]
    return [text, str(length), name, shown("seen", ".0%"), *memory, *times, *ends]


def table(rows: list[results.Row]) -> str:
    """A line for each text, length and kernel."""
    groups = by_shape(rows)
    lines = [line(*key, group, groups.get((*key[:2], PLAIN))) for key, group in groups.items()]
    return markdown(HEADS, lines) + NOTE.format(steps=BASE.steps)


# On the left and right: (text, metric, unit, marker and line, what the label adds).
CURVES = (
    (
        ("conversations", "cost/again/temporary_bytes", 1e9, "o-", ""),
        ("conversations", "cost/kept/temporary_bytes", 1e9, "o--", ", all activations kept"),
    ),
    (
        ("conversations", "s_per_step", 1, "o-", ""),
        ("one text", "s_per_step", 1, "s", ", one text"),
    ),
)


def figure(rows: list[results.Row]) -> Figure:
    """The step's memory and time against the tokens of a row, for each kernel."""
    groups = by_shape(rows)
    drawing = Figure(figsize=(10, 4), layout="constrained")
    memory, time = drawing.subplots(1, 2)
    for axes, curves in zip((memory, time), CURVES, strict=True):
        for number, name in enumerate(dict.fromkeys(name for *_, name in groups)):
            look = {"color": f"C{number}", "markerfacecolor": "none"}
            for text, metric, unit, style, more in curves:
                own = {n: g for (t, n, each), g in groups.items() if (t, each) == (text, name)}
                values = [group.statistic(metric).mean / unit for group in own.values()]
                axes.plot(list(own), values, style, label=name + more, **look)
        axes.set(xscale="log", xlabel="tokens in a row")
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    memory.set(yscale="log", ylabel="temporaries of a step, GB")
    time.set(ylim=(0, None), ylabel="seconds a step")
    for axes in (memory, time):
        axes.legend(frameon=False, fontsize=8)
    return drawing


TEXTS = {"conversations": conversations, "one text": one_text}
PLAIN, FLASH = "reference", "blockwise"
BASE = Config()
SWEEP = product(
    chain(param("length", *LENGTHS), [{"length": max(LENGTHS), "text": one_text}]),
    param("kernel", PLAIN, FLASH),
)
SMOKE = {"length": 64, "tokens": 128, "steps": 2, "layers": 1}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
