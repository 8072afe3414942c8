"""Head, label words or instructions: how should a language model learn to classify?

The same sarcastic headlines reach SmolLM2-135M-Instruct in three forms, with LoRA on all its linear
layers: a classification head on the states' mean (Radford et al. 2018; Devlin et al. 2019,
arXiv:1810.04805); label words after a pattern (PET, Schick & Schütze 2021, arXiv:2001.07676); chat
instructions with an answer (FLAN, Wei et al. 2021, arXiv:2109.01652). How many labelled headlines
does each need (Le Scao & Rush 2021, "How many data points is a prompt worth?", arXiv:2103.08493)?
The last two keep the language model: it is also asked other questions (QuaRTz, two options), which
it is not trained on, before and after. Chance is about one half in both tasks.

Differs from the papers: 135M parameters and one task; one pattern and one wording; no unlabelled text;
256 training examples seen in 32 steps, whatever the number of different headlines; one rate.
Standard errors: about 0.02 of 400 headlines, 0.06 of 60 questions.
Run:    python -m experiments.instruction_vs_classical --sweep      (8 runs, about 16 min beside other work)
Expect: little learned by anyone: with 16 headlines all forms stay at chance (0.55), with 256 label words
        reach 0.62, the head 0.57, chat none of it. Training costs the other questions, which are at chance
        before and after, 0.2 nats (label words) to 0.5 nats (chat) of the right answer. One seed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from experiments.shared import headline_classes, headline_forms, sarcasm
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_instruct
from experiments.shared.headline_forms import Form, Task, chat_answers, label_words
from research.data import corpora, source
from research.evaluate import prompting
from research.models import heads
from research.objectives import next_token
from research.runs import chain, main, param, product, results
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Params
from research.weights import lora

EXAM_SEED = 0  # of the questions that are asked: the same ones whatever the run's seed
FORMS = {"classification head": None, "label words": label_words, "chat": chat_answers}
SIZES = {str(size): size for size in (0, 16, 256)}


@dataclasses.dataclass(frozen=True)
class Config:
    """`form` None is the head. `train` 0 measures an untrained model.

    `length` is that of the head's rows, the other forms take what they need.
    """

    form: Form | None = label_words
    train: int = 256
    test: int = 400
    exam: str = "quartz"
    questions: int = 60
    targets: str = r"stack_0/.*/kernel"
    rank: int = 8
    scale: float = 2.0
    lr: float = 1e-3
    warmup_steps: int = 4
    steps: int = 32
    batch_size: int = 8
    length: int = 32
    seed: int = 0


def adapted(config: Config, params: Params) -> Params:
    rng = jax.random.fold_in(jax.random.key(config.seed), 1)
    return lora.add(params, config.targets, rng, config.rank, config.scale * config.rank)


def optimizer(config: Config) -> AdamW:
    return AdamW(Cosine(config.lr, config.steps, config.warmup_steps), weight_decay=0.0)


def by_head(config: Config, directory: Path) -> dict[str, float]:
    base = smollm2_instruct()
    data = headline_classes.read(base.tokenizer, config.train, config.test, config.length)
    params = headline_classes.with_head(base.model, adapted(config, base.params), config.seed)
    rule = rf"{lora.TRAINABLE}|{heads.TRAINABLE}"
    how = optimizer(config)
    _, found = headline_classes.tune(base.model, params, rule, how, data, config, directory)
    return {"accuracy": found["accuracy"]}


def trained(config: Config, model: Any, params: Params, task: Task, directory: Path) -> Params:
    """The adapted model after training on the answers."""
    return fit(
        next_token(model),
        source.supervised_source(task.train, config.batch_size, config.seed),
        adapted(config, params),
        optimizer(config),
        Training(config.steps, log_every=4, save_every=16, seed=config.seed, directory=directory),
        rule=lora.TRAINABLE,
        identity=config,
    ).params


def run(config: Config, directory: Path) -> dict[str, float]:
    if config.form is None:
        return by_head(config, directory)
    base = smollm2_instruct()
    exam = corpora.multiple_choice(config.exam)
    _, questions = prompting.split(exam, config.questions, EXAM_SEED)
    train, test = headline_classes.split(config.train, config.test)
    task = config.form(base.tokenizer, train, test, questions)
    params = base.params
    if task.train is not None:
        params = trained(config, base.model, params, task, directory)
    said = sarcasm.scores(base.model, params, task.test, task.labels, rows=4)
    other = headline_forms.other_task(base.model, params, task.other)
    return {"accuracy": said["accuracy"], **other}


def variants(rows: list[results.Row]) -> dict[tuple[str, int], results.Group]:
    """{(form, size): runs}."""
    found = cells(rows, BASE, form=FORMS, train=SIZES)
    return {(form, int(size)): group for (form, size), group in found.items()}


def table(rows: list[results.Row]) -> str:
    """A line for each form, a column for each number of headlines; before and after elsewhere."""
    found = variants(rows)
    sizes = sorted({size for _, size in found})
    trained_on = [size for size in sizes if size]

    def of(form: str, size: int, name: str) -> str:
        group = found.get((form, size))
        has = group is not None and name in group.rows[0]["metrics"]
        return str(group.statistic(name)) if has else "–"

    lines = [[form, *(of(form, size, "accuracy") for size in sizes)] for form in FORMS]
    task = markdown(["form", *(f"{size} headlines" for size in sizes)], lines)
    lines = [
        [form, name, *(of(form, size, key) for size in sizes)]
        for form in ("label words", "chat")
        for name, key in (("accuracy", "other_accuracy"), ("nats of the answer", "other_nll"))
    ]
    other = markdown(["form", "other questions", *map(str, sizes)], lines)
    seeds = min(len(found[key].rows) for key in found if key[1] in trained_on)
    return (
        f"{task}\nAccuracy on held-out headlines after training on so many, over {seeds} "
        f"seed{'s' * (seeds > 1)}.\n\n{other}\nQuestions of another task, which is not trained.\n"
    )


def figure(rows: list[results.Row]) -> Figure:
    """The task learned, and the task that is not trained, by the number of headlines."""
    found = variants(rows)
    drawing = Figure(figsize=(8, 3.6), layout="constrained")
    panels = drawing.subplots(1, 2)
    titles = ("accuracy on held-out headlines", "other questions, nats of the answer")
    for axes, name, title in zip(panels, ("accuracy", "other_nll"), titles, strict=True):
        for colour, form in enumerate(FORMS):
            groups = [(size, g) for (f, size), g in found.items() if f == form]
            points = [(s, g.statistic(name)) for s, g in groups if name in g.rows[0]["metrics"]]
            if points:
                sizes, scores = zip(*points, strict=True)
                spread = [s.std or 0 for s in scores]
                means = [s.mean for s in scores]
                look = {"marker": "o", "capsize": 3, "color": f"C{colour}", "label": form}
                axes.errorbar(sizes, means, yerr=spread, **look)
        axes.set_xscale("symlog", linthresh=16)
        axes.set_xticks(list(SIZES.values()), labels=list(SIZES))
        axes.minorticks_off()
        axes.set(xlabel="labelled headlines", title=title)
        axes.title.set_size(10)
        axes.grid(alpha=0.25)
    panels[0].legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
LANGUAGE = (label_words, chat_answers)
SWEEP = chain(
    product(param("train", 0), param("form", *LANGUAGE)),
    product(param("train", 16, 256), param("form", *FORMS.values())),
)
SMOKE = {
    "train": 8,
    "test": 8,
    "questions": 2,
    "rank": 2,
    "steps": 2,
    "warmup_steps": 1,
    "batch_size": 2,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
