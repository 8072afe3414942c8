"""Two Chinese families side by side: ChatGLM2 and Baichuan 2, small, pretrained and then instructed.

ChatGLM2 (Du et al. 2021, GLM, arXiv:2103.10360; GLM Team 2024, arXiv:2406.12793) has two key/value
heads, biases on q, k and v, RoPE on half of every head, and spends what the heads save on a wider
feed-forward. Baichuan 2 (Yang et al. 2023, arXiv:2309.10305) has a key/value head a query head,
RoPE on all of it, a head of normalised rows, and the max-z loss. Both have one vocabulary and one
size, read the same batches of Chinese sayings, poems and manuals, and are then trained whole on
Chinese Alpaca rows, each in its own chat layout, with loss on the answers only. Measured before and
after: held-out answers, and held-out text of the first kind, which shows what was forgotten.

Differs from the papers: 1.6M parameters, some 600,000 tokens; next-token prediction throughout,
where GLM also fills blanks; one tokenizer for both, so that nats a token compare too; one round.
Run:    python -m experiments.family_finetune --sweep        (2 families x 2 seeds, 12 min of 2 cores)
Expect: answers gain about a nat, and the text of pretraining loses nearly as much; Baichuan 2 ahead
        throughout, by its head (family_shootout).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from matplotlib.figure import Figure

from experiments.shared import chinese, small_lm
from experiments.shared.cells import cells, markdown
from experiments.shared.chinese import Chinese
from experiments.shared.small_lm import Recipe, Trained
from research.data import corpora, packing, source
from research.decode.generate import generate
from research.decode.sampling import Sampling
from research.evaluate import nll
from research.evaluate.nll import Likelihood
from research.models import decoder
from research.models.attention import even_head_size
from research.models.decoder import Decoder, DecoderConfig
from research.models.families.baichuan import baichuan
from research.models.families.glm import glm
from research.objectives import next_token
from research.runs import main, param, product, results
from research.tokenize import layout
from research.tokenize.formats import BAICHUAN2, CHATGLM2
from research.tokenize.layout import Format
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Objective, Params

CONTEXT = 1024  # tokens, of a row and of an answer to read
TIMES = ("before", "after")


def chatglm2(config: Config) -> DecoderConfig:
    """Two key/value heads; the feed-forward takes up what Baichuan's attention has more."""
    head_size, kv_heads = even_head_size(config.width, config.heads), min(2, config.heads)
    keys = kv_heads * head_size
    saved = 2 * config.width * (config.width - keys) - (config.width + 2 * keys)  # biases are more
    ffn = config.ffn + round(saved / (3 * config.width))
    sizes = (config.layers, config.width, config.heads, kv_heads, ffn)
    return glm(config.recipe.vocab_size, *sizes, max_length=CONTEXT)


def baichuan2(config: Config) -> DecoderConfig:
    """The 7B's parts: RoPE, and NormHead."""
    sizes = (config.layers, config.width, config.heads, config.ffn)
    return baichuan(config.recipe.vocab_size, *sizes, norm_head=True, max_length=CONTEXT)


class Parts(NamedTuple):
    """What a family has besides its blocks."""

    format: Format
    objective: Callable[[Decoder], Objective]


PARTS = {
    "chatglm2": Parts(CHATGLM2, next_token),
    "baichuan2": Parts(BAICHUAN2, partial(next_token, max_z_loss=2e-4)),
}
FAMILIES = {"ChatGLM2": chatglm2, "Baichuan 2": baichuan2}


@dataclasses.dataclass(frozen=True)
class Config:
    """`recipe` is of pretraining, the rest below it of fine-tuning: `steps` of `batch_size` packed
    rows of `length` tokens. `held_out` and `answers`: conversations to be scored, and to be read."""

    family: Callable[[Config], DecoderConfig] = chatglm2
    layers: int = 4
    width: int = 128
    heads: int = 8
    ffn: int = 344
    recipe: Recipe = Recipe(
        corpora.fortunes_zh,
        vocab_size=3072,
        length=256,
        batch_size=8,
        steps=300,
        eval_lengths=(256,),
        eval_tokens=16_384,
    )
    steps: int = 120
    batch_size: int = 4
    length: int = 512
    lr: float = 1e-3
    held_out: int = 100
    answers: int = 4
    answer_tokens: int = 96
    eval_every: int | None = 40
    save_every: int = 40
    seed: int = 0


class Task(NamedTuple):
    """What all runs read, and its conversations packed in the layout of the run's family."""

    chinese: Chinese
    train: packing.Table
    held_out: packing.Table


def read(config: Config) -> Task:
    recipe, format = config.recipe, PARTS[config.family.__name__].format
    found = chinese.read(
        recipe.texts(), recipe.vocab_size, config.length, recipe.held_out, config.held_out
    )
    pairs = (found.train, found.held_out)
    tables = [chinese.packed(found.text.tokenizer, format, p, config.length) for p in pairs]
    return Task(found, *tables)


def run(config: Config, directory: Path) -> dict[str, float]:
    task = read(config)
    base = small_lm.train(
        config.family(config),
        task.chinese.text,
        config.recipe,
        directory / "pretrained",
        config.seed,
        objective=PARTS[config.family.__name__].objective,
    )
    tuned = tune(config, task, base, directory)
    found = {"parameters": decoder.count_parameters(base.model)}
    found |= {"pretrain_tokens_per_s": base.tokens_per_s, "tokens_per_s": small_lm.speed(directory)}
    said = []
    for when, params in zip(TIMES, (base.params, tuned), strict=True):
        for name, each in scores(config, task, base.model, params).items():
            found[f"{when}/{name}_nll"] = each.per_token
            found[f"{when}/{name}_bits_per_byte"] = each.bits_per_byte
        said.append(answers(config, task, base.model, params))
    write_samples(directory, task, *said)
    return found


def tune(config: Config, task: Task, base: Trained, directory: Path) -> Params:
    """All weights, on the conversations."""
    schedule = Cosine(config.lr, config.steps, config.steps // 10, end=0.1 * config.lr)
    fitted = fit(
        PARTS[config.family.__name__].objective(base.model),
        source.supervised_source(task.train, config.batch_size, config.seed),
        base.params,
        AdamW(schedule, weight_decay=0.0),
        Training(
            config.steps,
            eval_every=config.eval_every,
            save_every=config.save_every,
            seed=config.seed,
            directory=directory,
        ),
        evaluate=lambda params: {"nll": of_answers(config, task, base.model, params).per_token},
        identity=dataclasses.replace(config, eval_every=None, save_every=1),
    )
    return fitted.params


def of_answers(config: Config, task: Task, model: Decoder, params: Params) -> Likelihood:
    """Of held-out answers and their ends; bytes are those of the answers."""
    size = chinese.answer_bytes(task.chinese.held_out)
    batches = packing.batches(task.held_out, config.batch_size)
    return nll.held_out(model, params, batches, byte_count=size)


def scores(config: Config, task: Task, model: Decoder, params: Params) -> dict[str, Likelihood]:
    """Of held-out answers, and of held-out text in the longest windows."""
    lengths, tokens = config.recipe.eval_lengths, config.recipe.eval_tokens
    text = small_lm.likelihood(model, params, task.chinese.text, lengths, tokens)
    return {"answers": of_answers(config, task, model, params), "text": text[max(lengths)]}


def answers(config: Config, task: Task, model: Decoder, params: Params) -> list[str]:
    """Greedy, to the first held-out questions."""
    tokenizer, format = task.chinese.text.tokenizer, PARTS[config.family.__name__].format
    asked = [messages[:1] for _, messages in task.chinese.held_out[: config.answers]]
    prompts = [layout.encode(tokenizer, format, messages)[0].tolist() for messages in asked]
    stop = layout.stop_ids(tokenizer, format)
    sampling = Sampling(temperature=0.0, max_tokens=config.answer_tokens, stop_ids=stop)
    said = generate(model, params, prompts, jax.random.key(0), sampling, tokenizer.pad_id)
    return [tokenizer.decode(row) for row in said.rows()]


def write_samples(directory: Path, task: Task, before: list[str], after: list[str]) -> None:
    lines = []
    for (_, messages), first, last in zip(task.chinese.held_out, before, after, strict=False):
        row = {"prompt": messages[0]["content"], "before": first, "after": last}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (directory / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def table(rows: list[results.Row]) -> str:
    lines = []
    for (name,), group in cells(rows, BASE, family=FAMILIES).items():
        line = [name, group.statistic("parameters")]
        for measure in ("answers_nll", "answers_bits_per_byte", "text_nll", "text_bits_per_byte"):
            line.append(" → ".join(str(group.statistic(f"{at}/{measure}")) for at in TIMES))
        speeds = [group.statistic(f"{part}tokens_per_s") for part in ("pretrain_", "")]
        lines.append([*line, *speeds])
    heads = ["family", "parameters", "answers, nats", "answers, bits a byte", "text, nats"]
    heads += ["text, bits a byte", "pretraining, tokens/s", "fine-tuning, tokens/s"]
    return markdown(heads, lines) + "\nHeld out, before → after fine-tuning; nats a token.\n"


def figure(rows: list[results.Row]) -> Figure:
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    for axes, name in zip(drawing.subplots(1, 2), ("answers", "text"), strict=True):
        for (family,), group in cells(rows, BASE, family=FAMILIES).items():
            found = [group.statistic(f"{at}/{name}_bits_per_byte") for at in TIMES]
            spread = [each.std or 0 for each in found]
            means = [each.mean for each in found]
            axes.errorbar(TIMES, means, yerr=spread, marker="o", capsize=3, label=family)
        axes.set(title=f"held-out {name}", ylabel="bits a byte", xlim=(-0.3, 1.3))
        axes.legend(frameon=False, fontsize=8)
    return drawing


BASE = Config()
SWEEP = product(param("family", *FAMILIES.values()), param("seed", 0, 1))
SMOKE = {
    "layers": 1,
    "width": 16,
    "heads": 4,
    "ffn": 24,
    "recipe": dataclasses.replace(
        small_lm.SMOKE, texts=corpora.fortunes_zh, vocab_size=600, eval_lengths=(16,)
    ),
    "steps": 2,
    "batch_size": 1,
    "held_out": 8,
    "answers": 1,
    "answer_tokens": 4,
    "eval_every": None,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
