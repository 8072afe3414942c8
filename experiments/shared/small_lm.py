"""A small language model from nothing: what experiments that compare decoders have in common.

    data = small_lm.data(recipe)                      # tokenizer and token streams, made once
    trained = small_lm.train(config, data, recipe, directory, seed)
    trained.metrics()                                 # {"nll/128": ..., "train_tokens_per_s": ...}

A Recipe says everything but the model and the seed; the DecoderConfig is the caller's own, with
`recipe.vocab_size` as its vocabulary. Training goes through `research.train.loop.fit`, so a run
that was cut off goes on from its directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.data import corpora, packing, source
from research.evaluate import nll
from research.evaluate.nll import Likelihood
from research.hub.download import cache_directory
from research.models import decoder
from research.models.decoder import Decoder, DecoderConfig
from research.objectives import next_token
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.train import train_bpe
from research.train import metrics
from research.train.loop import Training, fit
from research.train.optim import AdamW, Optimizer
from research.train.schedules import Cosine
from research.types import Objective, Params

END = "<|endoftext|>"
EVAL_TOKENS = 4096  # in one batch of an evaluation


def shakespeare() -> list[str]:
    """5 MB of plays and poems."""
    return list(corpora.shakespeare().values())


def wiki() -> list[str]:
    """1 MB of encyclopedia text."""
    return [corpora.wiki()]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Data and training. A step sees `batch_size` windows of `length` tokens.

    texts        a function of this module, or any other, that gives the documents
    held_out     the share at the end of every document that is not trained on
    lr           the peak of a cosine with `warmup` of the steps to get there, down to a tenth
    eval_lengths windows of the held-out text; each length must divide the largest
    eval_tokens  held-out tokens to predict, the same ones at every length
    """

    texts: Callable[[], Sequence[str]] = shakespeare
    vocab_size: int = 1024
    held_out: float = 0.1
    length: int = 128
    batch_size: int = 16
    steps: int = 400
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    eval_lengths: tuple[int, ...] = (128,)
    eval_tokens: int = 32_768
    save_every: int = 100

    def __post_init__(self):
        longest = max(self.eval_lengths)
        wrong = [length for length in self.eval_lengths if longest % length]
        if wrong:
            raise ValueError(f"eval_lengths {wrong} do not divide the longest, {longest}")

    @property
    def warmup_steps(self) -> int:
        return int(self.warmup * self.steps)

    def optimizer(self) -> AdamW:
        schedule = Cosine(self.lr, self.steps, self.warmup_steps, 0.1 * self.lr)
        return AdamW(schedule, weight_decay=self.weight_decay, b2=0.95)


@dataclasses.dataclass(frozen=True)
class Data:
    """Streams of tokens (memory maps), every document followed by its end."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model after training, and how that went; `tokens_per_s` is the median over log rows."""

    model: Decoder
    params: Params
    likelihood: dict[int, Likelihood]
    tokens_per_s: float

    def metrics(self) -> dict[str, float]:
        """Nats a token and bits a byte at each length, parameters, training speed."""
        found = {f"nll/{length}": each.per_token for length, each in self.likelihood.items()}
        found |= {f"bits_per_byte/{n}": each.bits_per_byte for n, each in self.likelihood.items()}
        size = decoder.count_parameters(self.model)
        return found | {"parameters": size, "train_tokens_per_s": self.tokens_per_s}


def data(recipe: Recipe) -> Data:
    """Split, tokenized text: made at the first call for these texts and sizes, then read.

    The byte-level BPE is trained on what the model is trained on, and on nothing held out.
    """
    texts = list(recipe.texts())
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:10]
    name = f"{digest}-{recipe.vocab_size}-{recipe.held_out}"
    place = cache_directory() / "small_lm" / name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=place.parent) as folder:
            _prepare(texts, recipe, Path(folder) / name)
            if not place.exists():  # another process may have been faster
                os.replace(Path(folder) / name, place)
    streams = [np.load(place / f"{part}.npy", mmap_mode="r") for part in ("train", "held_out")]
    return Data(Tokenizer.from_directory(place), *streams)


def split(texts: Sequence[str], held_out: float) -> tuple[list[str], list[str]]:
    """Beginnings and ends of the texts: what is trained on, and the share that is held out."""
    cuts = [round(len(text) * (1 - held_out)) for text in texts]
    pairs = list(zip(texts, cuts, strict=True))
    return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]


def bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the texts whose one control token is END."""
    return train_bpe(texts, vocab_size, (END,), bos=END, eos=END, pad=END)


def stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts as one stream of int32 tokens, each followed by its end."""
    rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    return np.concatenate(rows).astype(np.int32)


def _prepare(texts: Sequence[str], recipe: Recipe, place: Path) -> None:
    train, held_out = split(texts, recipe.held_out)
    tokenizer = bpe(train, recipe.vocab_size)
    tokenizer.save(place)
    for name, part in (("train", train), ("held_out", held_out)):
        np.save(place / f"{name}.npy", stream(tokenizer, part))


def train(
    config: DecoderConfig,
    data: Data,
    recipe: Recipe,
    directory: Path,
    seed: int,
    *,
    params: Params | None = None,
    optimizer: Optimizer | None = None,
    objective: Callable[[Decoder], Objective] = next_token,
) -> Trained:
    """Train a fresh model (or go on from `params`) for `recipe.steps`, and evaluate it.

    `optimizer` replaces the recipe's. `objective` binds the training loss to the model, as
    `partial(next_token, label_smoothing=0.1)` does; it has a canonical form, like a config's parts.
    The held-out likelihood is that of the plain model whatever was trained with. Checkpoints and
    curves are kept in `directory`, one directory for one call.
    """
    if config.vocab_size != recipe.vocab_size:
        raise ValueError(f"vocab_size: model {config.vocab_size}, recipe {recipe.vocab_size}")
    model = Decoder(config)
    identity = {"model": config, "recipe": dataclasses.replace(recipe, save_every=1)}
    if objective is not next_token:
        identity["objective"] = objective
    fitted = fit(
        objective(model),
        source.pretraining_source(data.train, recipe.length, recipe.batch_size, seed),
        decoder.init(model, jax.random.key(seed)) if params is None else params,
        recipe.optimizer() if optimizer is None else optimizer,
        Training(recipe.steps, save_every=recipe.save_every, seed=seed, directory=directory),
        identity=identity,
    )
    found = likelihood(model, fitted.params, data, recipe.eval_lengths, recipe.eval_tokens)
    return Trained(model, fitted.params, found, speed(directory))


def speed(directory: Path) -> float:
    """Tokens a second of a training run: the median over its log rows, so that compiling and
    pauses do not count."""
    rows = metrics.read(directory / "metrics.jsonl")
    return statistics.median(row["tokens_per_s"] for row in rows if row["split"] == "train")


def likelihood(
    model: Any, params: Params, data: Data, lengths: Sequence[int], tokens: int
) -> dict[int, Likelihood]:
    """Held-out likelihood in windows of each length, over about `tokens` of the same tokens.

    The text is cut into chunks of the longest length, evenly spaced over all documents, and each
    chunk into windows of the shorter lengths: what changes with the length is only how much of the
    past a window shows, half of it on average. Lengths beyond the positions that the model has are
    left out; its tokens are those of the others all the same.
    """
    longest, most = max(lengths), model.config.position.most
    count = packing.windows(len(data.held_out), longest)
    if not count:
        raise ValueError(f"{len(data.held_out)} held-out tokens hold no window of {longest}")
    chunks = min(max(tokens // longest, 1), count)
    chosen = [i * count // chunks for i in range(chunks)]
    found = {}
    for length in lengths:
        if most is not None and length > most:
            continue
        share = longest // length
        rows = [
            packing.stream_row(data.held_out, i * share + j, length)
            for i in chosen
            for j in range(share)
        ]
        found[length] = _likelihood(model, params, rows, length, data.tokenizer)
    return found


def _likelihood(
    model: Any, params: Params, rows: Iterable[dict], length: int, tokenizer: Tokenizer
) -> Likelihood:
    rows = list(rows)
    table = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    text = tokenizer.decode(table["targets"].reshape(-1).tolist())  # ends stand for no text
    batches = packing.batches(table, min(max(EVAL_TOKENS // length, 1), len(rows)))
    return nll.held_out(model, params, batches, byte_count=len(text.encode()))


SMOKE = Recipe(wiki, 300, length=16, batch_size=2, steps=2, eval_lengths=(16, 32), eval_tokens=64)
