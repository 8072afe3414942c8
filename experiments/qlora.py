"""Does training win back what four bits lost?  Dettmers et al. 2023, QLoRA (arXiv:2305.14314), Table 4.

SmolLM2-135M-Instruct learns English Alpaca rows, packed, through its chat template: all weights; LoRA
of rank 16 on every matrix of a block; the same LoRA over NF4 with double quantization (QLoRA), with
8-bit Adam and every layer computed again in the backward pass; with the embedding table in NF4 too;
and from LoftQ's start (arXiv:2310.08659, one step). All see the same rows in the same order.

The gap is what NF4 costs in nats a token of held-out answers before training; what is left of it is
how far a run ends above LoRA over dense matrices. At the end each model is rounded to NF4 once
more: an adapter merged and its matrix rounded again, and, of models that trained dense, their
matrices for the first time. Memory is the compiled step's, with and without layers computed again.

Differs from the paper: 135M parameters, not 7B to 65B, whose weights are a small part of a step's
memory; the base was a 4-bit release (Q4_1) made dense, so that it was rounded twice; some dozen
steps; no search for rates, one for all LoRA runs; optimizer state is paged only by
`--set way.paged=True`, since on a CPU both memories are one. One seed: rows 0.01 nats apart may be equal.
Run:    OPENBLAS_NUM_THREADS=1 bash scripts/cpu.sh .venv/bin/python -m experiments.qlora --sweep
        (5 runs, about 25 min on 2 idle cores. LoftQ's singular vectors of 210 matrices otherwise wait
        for their own threads on a machine with other work: minutes instead of half a minute.)
Expect: NF4 costs 0.22 nats, with the table 0.32. In 24 steps LoRA over it comes back to the untrained dense
        model, but LoRA over dense matrices learns meanwhile: over half of the gap is left (the paper: no
        difference in MMLU, after thousands of steps). LoftQ starts a sixth lower and keeps the lead. Rounding the
        merged matrices again costs nine tenths of the gap once more. The weights take a third of the bytes, half of
        them the table's; computing layers again spares four fifths of a step's memory.
"""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from pathlib import Path

from matplotlib.figure import Figure

from experiments.shared import few_bits, sft
from experiments.shared.cells import cells, markdown
from experiments.shared.few_bits_tuning import (
    FINDINGS,
    QLORA,
    Way,
    by_row,
    costs,
    findings,
    in_few_bits,
    median_seconds,
    optimizer_of,
    prepared,
    rise,
    total,
    tune,
)
from experiments.shared.first_layers import smollm2_instruct, smollm2_layers
from research.data import corpora, formats, packing, source
from research.evaluate.nll import Likelihood
from research.runs import main, param, results
from research.tokenize import chat
from research.types import Params
from research.weights.base import merge

WAYS = {
    "all weights": Way(lr=1e-4, rank=0),
    "LoRA": Way(),
    "QLoRA": QLORA,
    "QLoRA, table too": dataclasses.replace(QLORA, quantized=few_bits.ALL),
    "QLoRA from LoftQ": dataclasses.replace(QLORA, loftq_steps=1),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A step sees batch_size packed rows of `length` tokens; `layers` None is the whole model.

    held_out    conversations; `questions` those of an exam that the rows do not teach
    """

    way: Way = QLORA
    warmup_steps: int = 3
    steps: int = 24
    batch_size: int = 2
    length: int = 512
    layers: int | None = None
    held_out: int = 24
    exam: str = "quartz"
    questions: int = 40
    seed: int = 0


@cache
def tables(length: int, held_out: int) -> tuple[packing.Table, packing.Table]:
    """Packed rows to train on, and those of `held_out` conversations; a sweep reads them once."""
    encode = partial(chat.encode_chat, smollm2_instruct().tokenizer)
    parts = sft.split(list(formats.conversations(corpora.alpaca_en())), held_out)
    train, kept = (sft.packed(part, encode, length) for part in parts)
    return train, kept


@cache
def untouched(config: Config) -> tuple[list[Likelihood], float]:
    """The dense base before training: the likelihood of each held-out row, and the exam's share."""
    base = smollm2_layers(config.layers)
    rows = by_row(base.model, base.params, tables(config.length, config.held_out)[1])
    return rows, sft.exam(base, config.exam, config.questions).value


def dense_base(config: Config) -> tuple[list[Likelihood], float]:
    """`untouched`, once a process whatever the way and the seed."""
    return untouched(dataclasses.replace(config, way=Way(), seed=0))


def measured(config: Config, stage: str, params: Params, asked: bool = False) -> dict[str, float]:
    """Held-out nats, the rise above the dense base and its error; the exam's share if `asked`."""
    print(f"  measuring: {stage}", flush=True)
    base = smollm2_layers(config.layers)
    rows = by_row(base.model, params, tables(config.length, config.held_out)[1])
    mean, error = rise(rows, dense_base(config)[0])
    found = {f"{stage}/nll": total(rows), f"{stage}/rise": mean, f"{stage}/rise_se": error}
    if asked:
        tuned = dataclasses.replace(base, params=params)
        found[f"{stage}/exam"] = sft.exam(tuned, config.exam, config.questions).value
    return found


def beginning(config: Config, start: Params) -> dict[str, float]:
    """Before training: the dense base, and what a way that quantizes begins with (else B = 0)."""
    rows, exam = dense_base(config)
    nll = total(rows)
    found = {"dense/nll": nll, "dense/exam": exam}
    if config.way.quantized:
        return found | measured(config, "before", start, asked=True)
    return found | {"before/nll": nll, "before/rise": 0.0, "before/exam": exam}


def run(config: Config, directory: Path) -> dict[str, float]:
    base, way = smollm2_layers(config.layers), config.way
    train, _ = tables(config.length, config.held_out)
    start, rule = prepared(way, base.params, config.seed)
    batch = source.supervised_batch(train, config.batch_size, config.seed, 0)
    memory = costs(base.model, start, rule, optimizer_of(way, config), batch)
    found = {f"held/{k}": v for k, v in few_bits.sizes(start).items()}
    found |= {f"cost/{k}": v for k, v in memory.items()} | beginning(config, start)
    trained, steps = tune(base.model, way, start, rule, train, config, directory)
    found["s_per_step"] = median_seconds(steps)
    found |= measured(config, "after", trained, asked=True)
    if way.rank:
        found |= measured(config, "merged", merge(trained))
    rounded = in_few_bits(trained, way.format)
    found |= measured(config, "few_bits", rounded)
    found["few_bits/parameter_bytes"] = few_bits.sizes(rounded)["parameter_bytes"]
    checked = findings(trained, start, base.params, directory)
    return found | {f"diagnosis/{k}": v for k, v in checked.items()}


def ways(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, way=WAYS).items()}


def left(group: results.Group, lora: results.Group) -> float:
    """The part of the gap before training that is left after it, LoRA over dense matrices being none."""
    over = {stage: group.statistic(f"{stage}/nll").mean for stage in ("before", "after")}
    plain = {stage: lora.statistic(f"{stage}/nll").mean for stage in ("before", "after")}
    return (over["after"] - plain["after"]) / (over["before"] - plain["before"])


# After the way, what it began with and the part of the gap: (head, metric, form, unit).
COLUMNS = (
    ("after", "after/nll", ".3f", 1),
    ("merged", "merged/nll", ".3f", 1),
    ("in NF4", "few_bits/nll", ".3f", 1),
    ("exam before", "before/exam", ".2f", 1),
    ("after", "after/exam", ".2f", 1),
    ("weights MB", "held/parameter_bytes", ",.0f", 1e6),
    ("optimizer MB", "cost/optimizer_bytes", ",.0f", 1e6),
    ("peak MB", "cost/kept/peak_bytes", ",.0f", 1e6),
    ("layers again", "cost/again/peak_bytes", ",.0f", 1e6),
    ("s a step", "s_per_step", ".1f", 1),
)
HEADS = ["trained", "nats before", "gap left", *(column[0] for column in COLUMNS), "findings"]
NOTE = """
Nats a token of {held_out} held-out conversations' answers, {dense:.3f} under the dense base; an exam of
{questions} questions, whose standard error is 0.08. Gap left: nats above LoRA's over its nats above the
base before training. Merged: as one dense matrix; in NF4: rounded (again) after training. Peak: arguments
and temporaries of the compiled step of {tokens:,} tokens, and with layers computed again. Seconds are the
median step's. Findings: of `quantize.diagnose`, of all layers' matrices.
"""


def line(name: str, group: results.Group, lora: results.Group | None) -> list[str]:
    has = {key for row in group.rows for key in results.metrics(row)}

    def shown(key: str, form: str = ".3f", unit: float = 1) -> str:
        return format(group.statistic(key).mean / unit, form) if key in has else "–"

    before, part = shown("before/nll"), "–"
    if "before/rise_se" in has:
        before += f" ({shown('before/rise', '+.3f')} ± {shown('before/rise_se')})"
        part = "–" if lora is None else f"{left(group, lora):.0%}"
    count = sum(group.statistic(f"diagnosis/{key}").mean for key in FINDINGS)
    each = [shown(*column[1:]) for column in COLUMNS]
    return [name, before, part, *each, f"{count:.0f} of {shown('diagnosis/rows', '.0f')}"]


def table(rows: list[results.Row]) -> str:
    """A line for each way."""
    found = ways(rows)
    lines = [line(name, group, found.get("LoRA")) for name, group in found.items()]
    dense = next(iter(found.values())).statistic("dense/nll").mean
    note = NOTE.format(
        held_out=BASE.held_out,
        dense=dense,
        questions=BASE.questions,
        tokens=BASE.batch_size * BASE.length,
    )
    return markdown(HEADS, lines) + note


LOOKS = (
    ("before", "o", "none", "before training"),
    ("after", "o", "C0", "after"),
    ("few_bits", "s", "none", "after, rounded to NF4"),
)


def figure(rows: list[results.Row]) -> Figure:
    """Held-out nats of each way before and after training, and rounded to NF4 after it."""
    found = ways(rows)
    drawing = Figure(figsize=(7, 3.6), layout="constrained")
    axes = drawing.subplots()
    for stage, marker, face, label in LOOKS:
        values = [group.statistic(f"{stage}/nll").mean for group in found.values()]
        look = {"color": "C0", "markerfacecolor": face, "label": label}
        axes.plot(values, range(len(found)), marker, **look)
    dense = next(iter(found.values())).statistic("dense/nll").mean
    axes.axvline(dense, color="grey", linewidth=0.8, label="dense base")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("nats a token of held-out answers")
    axes.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = param("way", *WAYS.values())
SMOKE = {
    "steps": 2,
    "warmup_steps": 1,
    "batch_size": 1,
    "length": 96,
    "layers": 1,
    "held_out": 12,
    "questions": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
