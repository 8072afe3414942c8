"""Pretraining from nothing: a tokenizer and a small LLaMA on Shakespeare's plays and poems.

A byte-level BPE tokenizer is trained on the training texts, then a LLaMA of a few million
parameters reads them once or so. The last tenth of every text is held out. Measured in bits per
byte too, which a model with another tokenizer can be compared by, and sampled.

Run:    python -m experiments.pretrain_shakespeare
Expect: held-out loss falls throughout; under 2.5 bits per byte after one pass; verse in the samples.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.shared import small_lm
from research import hub
from research.data import packing, source
from research.decode.generate import generate
from research.decode.sampling import Sampling
from research.evaluate import nll
from research.models import decoder
from research.models.families import llama
from research.objectives import next_token
from research.runs import main, param
from research.tokenize.tokenizer import Tokenizer
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine

PROMPTS = ("ROMEO:\n", "To be, or not to be", "Shall I compare thee")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of tokenizer, model and training; `length` in tokens, `held_out` a share of each text."""

    vocab_size: int = 2048
    layers: int = 6
    width: int = 192
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512
    length: int = 256
    batch_size: int = 16
    steps: int = 400
    lr: float = 2e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    held_out: float = 0.1
    texts: int | None = None  # None is all 42
    eval_batches: int = 12
    sample_tokens: int = 80
    eval_every: int | None = 60
    save_every: int = 60
    seed: int = 0


def tokenizer_of(config: Config, texts: list[str], directory: Path) -> Tokenizer:
    """The run's tokenizer: trained at first, read from the run's directory after that."""
    place, unfinished = directory / "tokenizer", directory / "tokenizer.partial"
    if not place.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        small_lm.bpe(texts, config.vocab_size).save(unfinished)
        unfinished.rename(place)
    return Tokenizer.from_directory(place)


def model_of(config: Config) -> decoder.Decoder:
    return decoder.Decoder(
        llama.llama(
            config.vocab_size,
            config.layers,
            config.width,
            config.heads,
            config.kv_heads,
            config.ffn,
            max_length=1024,
            tied=True,
        )
    )


def likelihood(config: Config, model: Any, params: Any, held_out: Any) -> dict[str, float]:
    """Over evenly spaced windows of the held-out stream, so that every text has its share."""
    tokens, tokenizer = held_out
    count = packing.windows(len(tokens), config.length)
    windows = min(config.eval_batches * config.batch_size, count)
    chosen = [i * count // windows for i in range(windows)]
    rows = [packing.stream_row(tokens, i, config.length) for i in chosen]
    table = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    text = tokenizer.decode(table["targets"].reshape(-1).tolist())  # ends stand for no text
    batches = packing.batches(table, config.batch_size)
    found = nll.held_out(model, params, batches, byte_count=len(text.encode()))
    return {"nll": found.per_token, "bits_per_byte": found.bits_per_byte}


def run(config: Config, directory: Path) -> dict[str, float]:
    train, test = small_lm.split(small_lm.shakespeare()[: config.texts], config.held_out)
    tokenizer = tokenizer_of(config, train, directory)
    tokens = small_lm.stream(tokenizer, train)
    held_out = small_lm.stream(tokenizer, test), tokenizer
    model = model_of(config)
    params = decoder.init(model, jax.random.key(config.seed))
    size = decoder.count_parameters(model)
    print(f"  {size:,} parameters, {len(tokens):,} tokens to train on", flush=True)
    schedule = Cosine(config.lr, config.steps, config.warmup_steps, end=0.1 * config.lr)
    before = likelihood(config, model, params, held_out)
    fitted = fit(
        next_token(model),
        source.pretraining_source(tokens, config.length, config.batch_size, config.seed),
        params,
        AdamW(schedule, weight_decay=config.weight_decay, b2=0.95),
        Training(
            config.steps,
            eval_every=config.eval_every,
            save_every=config.save_every,
            seed=config.seed,
            directory=directory,
        ),
        evaluate=lambda params: likelihood(config, model, params, held_out),
        identity=dataclasses.replace(config, eval_every=None, save_every=1),
    )
    described = llama.to_huggingface(model.config)
    trained = hub.Pretrained(model, fitted.params, tokenizer, described)
    hub.save(directory / "model", trained)
    samples(config, trained, directory)
    return (
        {f"before/{name}": value for name, value in before.items()}
        | {f"after/{name}": value for name, value in fitted.evaluation.items()}
        | {"parameters": size, "tokens": config.steps * config.batch_size * config.length}
    )


def samples(config: Config, trained: hub.Pretrained, directory: Path) -> None:
    """Continuations at temperature 0.8, top-p 0.95, for the report."""
    sampling = Sampling(0.8, top_p=0.95, max_tokens=config.sample_tokens)
    tokenizer = trained.tokenizer
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    said = generate(trained.model, trained.params, prompts, jax.random.key(config.seed), sampling)
    rows = [
        {"prompt": prompt, "before": "", "after": tokenizer.decode(row)}
        for prompt, row in zip(PROMPTS, said.rows(), strict=True)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / "samples.jsonl").write_text(text)


BASE = Config()
SWEEP = param("seed", 0)
SMOKE = {
    "vocab_size": 300,
    "layers": 1,
    "width": 32,
    "heads": 2,
    "kv_heads": 1,
    "ffn": 48,
    "length": 32,
    "batch_size": 2,
    "steps": 2,
    "warmup_steps": 1,
    "texts": 1,
    "eval_batches": 1,
    "sample_tokens": 4,
    "eval_every": None,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, smoke=SMOKE)
