"""Ways to train a decoder over matrices of few bits, and what is looked at afterwards.

    params, rule = prepared(way, base.params, seed)
    trained, steps = tune(model, way, params, rule, table, config, directory)
    rise(by_row(model, trained, table), by_row(model, base.params, table))
    in_few_bits(trained, way.format)         # rounded (again)

Rises are of the same packed rows under both parameters, so that their errors are paired.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import median

import jax
import numpy as np

from experiments.shared import few_bits, sft
from experiments.shared.lesson import Lesson
from research.data import packing, source
from research.evaluate import nll
from research.evaluate.nll import Likelihood
from research.models.decoder import Decoder
from research.objectives import next_token
from research.plan.program import Job
from research.quantize import diagnose, loftq
from research.quantize.requantize import quantized_in, requantize
from research.train import metrics
from research.train.loop import Training, fit
from research.train.optim import AdamW, AdamW8bit, Optimizer, Paged
from research.train.partition import Rule
from research.train.schedules import Cosine
from research.types import Batch, Params
from research.weights import lora
from research.weights.base import is_weight, merge
from research.weights.formats import Codebook, Format
from research.weights.quantized import quantize

NF4 = Codebook("NF4", 64, double=True)


@dataclasses.dataclass(frozen=True)
class Way:
    """`quantized` matches the paths of what is put in `format`; "" is nothing. Rank 0 trains all weights.

    lr            the peak of a cosine down to a tenth
    optimizer     whose own lr does not count; `paged` keeps its state in the host's memory
    again         every layer is computed again in the backward pass
    loftq_steps   fit base and factors together (`quantize.loftq`), on the matrices of blocks
    """

    lr: float = 1e-3
    rank: int = 16
    alpha: float = 32.0
    quantized: str = ""
    format: Format = NF4
    loftq_steps: int = 0
    optimizer: Optimizer = AdamW(weight_decay=0.0)
    paged: bool = False
    again: bool = False

    def __post_init__(self):
        if not self.rank and self.quantized:
            raise ValueError("codes do not train: a way that quantizes needs a rank above 0")
        if self.loftq_steps and self.quantized != few_bits.LINEAR:
            raise ValueError(
                f"loftq_steps: LoftQ fits {few_bits.LINEAR!r}, quantized is {self.quantized!r}"
            )


QLORA = Way(quantized=few_bits.LINEAR, optimizer=AdamW8bit(weight_decay=0.0), again=True)


def prepared(way: Way, params: Params, seed: int) -> tuple[Params, Rule]:
    """The parameters as training finds them, and the rule that says which of them train."""
    if way.loftq_steps:
        rng = jax.random.fold_in(jax.random.key(seed), 1)
        args = (rng, way.rank, way.format, way.loftq_steps, way.alpha)
        return loftq.add(params, sft.LINEAR, *args), ((lora.TRAINABLE, True), (r".*", False))
    if way.quantized:
        params = quantize(params, way.quantized, way.format)
    if not way.rank:
        return params, r".*"
    return sft.with_lora(params, sft.LINEAR, way.rank, way.alpha, seed)


def optimizer_of(way: Way, config: Lesson) -> Optimizer | Paged:
    lr = way.lr
    schedule = Cosine(lr, config.steps, config.warmup_steps, end=0.1 * lr)
    optimizer = dataclasses.replace(way.optimizer, lr=schedule)
    return Paged(optimizer) if way.paged else optimizer


def computed_again(model: Decoder, again: bool) -> Decoder:
    """The model whose layers are computed again in the backward pass, or not."""
    return model.clone(config=dataclasses.replace(model.config, remat="full" if again else None))


def costs(
    model: Decoder, params: Params, rule: Rule, optimizer: Optimizer | Paged, batch: Batch
) -> dict[str, float]:
    """Bytes of the compiled step of `next_token`: with all activations kept, and with layers computed again."""
    job = Job(model, params, rule, next_token, optimizer, batch)
    found = {"optimizer_bytes": float(job.optimizer_bytes())}
    for name, again in (("kept", False), ("again", True)):
        each = dataclasses.replace(job, model=computed_again(model, again)).memory()
        found |= {f"{name}/{key}": float(value) for key, value in each.items()}
    return found


def tune(
    model: Decoder,
    way: Way,
    start: Params,
    rule: Rule,
    table: packing.Table,
    config: Lesson,
    directory: Path,
) -> tuple[Params, list[metrics.Row]]:
    """The parameters after `config.steps` on packed rows, and each step's row of metrics."""
    fitted = fit(
        next_token(computed_again(model, way.again)),
        source.supervised_source(table, config.batch_size, config.seed),
        start,
        optimizer_of(way, config),
        Training(config.steps, log_every=1, keep=1, seed=config.seed, directory=directory),
        rule=rule,
        identity=config,
    )
    rows = metrics.read(directory / "metrics.jsonl")
    return fitted.params, [row for row in rows if row["split"] == "train"]


def seconds(steps: list[metrics.Row]) -> list[float]:
    """Of the steps after the first, which compiles; of that one when it is alone."""
    return [row["s_per_step"] for row in steps[1:] or steps]


def median_seconds(steps: list[metrics.Row]) -> float:
    return median(seconds(steps))


def by_row(model: Decoder, params: Params, table: packing.Table) -> list[Likelihood]:
    """The likelihood of each packed row's answers."""
    return [nll.held_out(model, params, [batch]) for batch in packing.batches(table, 1)]


def rise(rows: list[Likelihood], base: list[Likelihood]) -> tuple[float, float]:
    """Nats a token of `rows` above `base`, and its standard error, as of a ratio of sums over rows."""
    tokens = np.array([row.tokens for row in rows])
    moved = np.array([row.nll for row in rows]) - np.array([row.nll for row in base])
    mean, n = moved.sum() / tokens.sum(), len(rows)
    if n < 2:
        raise ValueError(f"a standard error needs two packed rows or more, not {n}")
    spread = np.square(moved - mean * tokens).sum() * n / (n - 1)
    return float(mean), float(spread**0.5 / tokens.sum())


def total(rows: list[Likelihood]) -> float:
    return sum(rows[1:], rows[0]).per_token


def in_few_bits(trained: Params, format: Format) -> Params:
    """A trained model rounded to `format`: adapters merged again, dense matrices for the first time."""
    nodes = jax.tree.leaves(trained, is_leaf=is_weight)
    if any(quantized_in(node) is not None for node in nodes):
        return requantize(trained)
    return quantize(merge(trained), few_bits.LINEAR, format)


FINDINGS = (*diagnose.NAMES.values(), "negative scales", "dead factors", "not finite")


def findings(trained: Params, start: Params, dense: Params, directory: Path) -> dict[str, float]:
    """How many matrices of how many layers have each finding; all of them are written down."""
    rows = diagnose.diagnose(trained, start, dense)
    (directory / "diagnosis.txt").write_text(diagnose.text(rows))
    found = {name: 0.0 for name in FINDINGS}
    for name in (name for row in rows for name in row.findings):
        found[name] += 1
    for field in ("error", "update"):
        values = [value for row in rows if (value := getattr(row, field)) is not None]
        found |= {f"largest_{field}": max(values)} if values else {}
    return {"rows": float(len(rows))} | found
