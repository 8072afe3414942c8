"""What does each way of fine-tuning cost, and what does it learn?  One model, one task, all methods.

SmolLM2-135M-Instruct tells sarcastic headlines from serious ones by a label word, one headline a row,
48 steps of 8. Full fine-tuning and nine methods of `experiments.shared.methods` see the same rows; each
has a rate and a size of its own, mostly smaller than its paper's. Memory and arithmetic are those of
the compiled training step: temporaries and arguments, and the operations of the step with its layers
unrolled and nothing rematerialised.

Papers: LoRA arXiv:2106.09685, DoRA 2402.09353, AdaLoRA 2303.10512, (IA)³ 2205.05638, BitFit 2106.10199,
prompt tuning 2104.08691, prefix tuning 2101.00190, adapters 1902.00751 (Houlsby), 2005.00247 (Pfeiffer).
Differs from them: a small model, far from converged, and no search for rates; who learns fastest in
48 steps is ahead, which says little about where each would end.
Run:    python -m experiments.peft_compare --sweep         (21 runs, about 35 min on 2 idle cores)
        python -m experiments.peft_compare --set method=experiments.shared.methods:DoRA method.rank=4
        (P-tuning, P-tuning v2 and parallel adapters are there too, not in the sweep)
Expect: costs as counted: LoRA two thirds of the full step's operations and a quarter of its peak memory,
        soft prompts no optimizer state to speak of. Full fine-tuning learns most (0.76 against 0.57 to
        0.72), (IA)³ is next with 0.04 % of the parameters, prefix tuning has learned nothing yet. Between
        the others two seeds tell nothing: they differ as much as methods do.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
from matplotlib.figure import Figure

from experiments.shared import methods, sarcasm
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_instruct
from experiments.shared.methods import METHODS
from research.data.source import supervised_batch
from research.plan.program import Job
from research.runs import chain, main, param, product, results


@dataclasses.dataclass(frozen=True)
class Config:
    """A step sees batch_size headlines of at most `length` tokens."""

    method: methods.Method = METHODS["LoRA"]
    warmup_steps: int = 5
    steps: int = 48
    batch_size: int = 8
    length: int = 24
    train: int = 2000
    test: int = 200
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    adapted, data = sarcasm.prepare(config)
    _, found = sarcasm.adapt(adapted, data, config, directory)
    base = jax.tree.leaves(smollm2_instruct().params)
    found |= {"parameters": sum(leaf.size for leaf in base)}
    return found | costs_of(dataclasses.replace(config, seed=0))


@functools.cache
def costs_of(config: Config) -> dict[str, float]:
    """Computed once for all seeds of a process: they cost the same. None for what does not train."""
    adapted, data = sarcasm.prepare(config)
    return {} if adapted.rule is None else job(adapted, data, config).costs()


def job(adapted: methods.Adapted, data: sarcasm.Headlines, config: Config) -> Job:
    return Job(
        adapted.model,
        adapted.params,
        adapted.rule,
        lambda model: sarcasm.objective_of(adapted._replace(model=model)),
        sarcasm.optimizer_of(adapted, config),
        supervised_batch(data.train, config.batch_size, config.seed, 0),
    )


def variants(rows: list[results.Row]) -> dict[str, results.Group]:
    return {name: group for (name,), group in cells(rows, BASE, method=METHODS).items()}


def shown(group: results.Group, name: str, unit: float = 1.0, form: str = ".2f") -> str:
    """A cost, the same for all seeds but for its noise; "–" where there is none."""
    found = [m[name] for row in group.rows if name in (m := results.metrics(row))]
    return format(sum(found) / len(found) / unit, form) if found else "–"


def line(name: str, group: results.Group, full: results.Group | None) -> list[str]:
    """A method's line of the table."""
    trained = group.statistic("trainable_parameters").mean
    share = trained / group.statistic("parameters").mean
    flops = shown(group, "flops", 1e9, ".1f")
    if full is not None and flops != "–":
        flops += f" ({group.statistic('flops').mean / full.statistic('flops').mean:.2f})"
    return [
        name,
        f"{trained:,.0f}",
        f"{share:.3%}",
        str(group.statistic("accuracy")),
        str(group.statistic("nll")),
        shown(group, "peak_bytes", 1e6, ",.0f"),
        shown(group, "temporary_bytes", 1e6, ",.0f"),
        shown(group, "optimizer_bytes", 1e6, ",.2f"),
        flops,
        shown(group, "s_per_step"),
    ]


HEADS = ["method", "trained", "share", "accuracy", "label nats", "peak MB", "of it temporary"]
HEADS += ["optimizer MB", "GFLOP a step (of full)", "s a step"]
NOTE = """
{seeds} seeds, mean ± standard deviation; {test} held-out headlines; nats of the right one of the two label
words, of which chance has 0.693. Peak: arguments (weights, optimizer state, batch) and temporaries of
the compiled step of {rows} rows. The median step's seconds were taken beside other work: they
are rough, `scripts.bench_peft` compares steps side by side.
"""


def table(rows: list[results.Row]) -> str:
    found = variants(rows)
    lines = [line(name, group, found.get("full")) for name, group in found.items()]
    # What does not train is the same whatever the seed, and run once.
    seeds = min((len(group.rows) for name, group in found.items() if name != "nothing"), default=1)
    return markdown(HEADS, lines) + NOTE.format(seeds=seeds, test=BASE.test, rows=BASE.batch_size)


def figure(rows: list[results.Row]) -> Figure:
    """Label nats against trained parameters; the line is the untrained model."""
    found = variants(rows)
    drawing = Figure(figsize=(7, 4.2), layout="constrained")
    axes = drawing.subplots()
    base = found.pop("nothing", None)
    if base is not None:
        axes.axhline(base.statistic("nll").mean, color="grey", linewidth=0.8, label="untrained")
    for number, (name, group) in enumerate(found.items()):
        nll, trained = group.statistic("nll"), group.statistic("trainable_parameters").mean
        marker = "os^Dv"[number // 10]
        axes.errorbar(trained, nll.mean, yerr=nll.std or 0, fmt=marker, capsize=3, label=name)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="nats of the label word, held out")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


BASE = Config()
LEFT_OUT = ("nothing", "P-tuning", "P-tuning v2", "parallel adapters")
TRAINED = [method for name, method in METHODS.items() if name not in LEFT_OUT]
SWEEP = chain(
    param("method", METHODS["nothing"]), product(param("seed", 0, 1), param("method", *TRAINED))
)
SMOKE = {
    "steps": 2,
    "warmup_steps": 1,
    "train": 8,
    "test": 4,
    "batch_size": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
