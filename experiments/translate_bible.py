"""Translation by the 2017 Transformer (Vaswani et al., arXiv:1706.03762): English to Spanish verses.

Trained on the verses of two Bibles in the public domain, the King James Version and Reina-Valera
1909, which are aligned by their references; four books are held out whole, two more are for the
loss during training. BLEU and chrF by sacrebleu, by greedy search and by four beams.

Differs from the paper: 31,000 short pairs in one style, not 4.5 million; a model of 1.4M parameters;
pre-norm where `residual` says so; the rate of the paper times `rate`; scores divided by
length^penalty.
Run:    python -m experiments.translate_bible        (10 minutes of 2 cores)
Expect: held-out loss falls throughout; four beams about two BLEU above greedy search, mostly by the
        length, and hardly above it in chrF.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import sacrebleu

from research.data import corpora, packing, source
from research.data.corpora import Verse
from research.data.parallel import Pair, pack_pairs
from research.decode.beam import Beams
from research.decode.translate import translate
from research.evaluate import nll
from research.models import seq2seq
from research.models.block import Residual, post_norm
from research.models.families.transformer import transformer
from research.objectives import next_token
from research.runs import main, param, results
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.train import train_bpe
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import InverseSquareRoot

BOS, END = "<s>", "</s>"
TEST = ("Ruth", "Esth", "Phil", "Jas")
VALIDATION = ("Joel", "1Pet")
SEARCHES = {"greedy": 1, "beam4": 4}


@dataclasses.dataclass(frozen=True)
class Config:
    """`length` in tokens a row and side; longer verses are left out, in training. `test` verses."""

    vocab_size: int = 4096
    layers: int = 2
    width: int = 128
    heads: int = 4
    ffn: int = 512
    residual: Residual = post_norm
    dropout: float = 0.1
    label_smoothing: float = 0.1
    length: int = 128
    batch_size: int = 16
    steps: int = 1500
    rate: float = 0.5
    warmup_steps: int = 400
    penalty: float = 0.6
    train: int | None = None  # verses, None is all
    test: int | None = None
    max_tokens: int = 128
    eval_every: int | None = 200
    save_every: int = 100
    seed: int = 0


def split(config: Config) -> tuple[list[Verse], list[Verse], list[Verse]]:
    """Verses to train on, for validation, and for the test; by book, as neighbours are alike.

    A verse twice as long in one language as in the other is not its translation, and not learned.
    """
    verses = corpora.verses()
    held_out = {
        name: [v for v in verses if v.reference.book in name] for name in (VALIDATION, TEST)
    }
    train = [
        verse
        for verse in verses
        if verse.reference.book not in VALIDATION + TEST
        and 0.5 <= len(verse.english) / len(verse.spanish) <= 2
    ]
    return train[: config.train], held_out[VALIDATION], held_out[TEST][: config.test]


def tokenizer_of(config: Config, verses: Sequence[Verse], directory: Path) -> Tokenizer:
    """One vocabulary for both languages: trained at first, read from the directory after that."""
    place, unfinished = directory / "tokenizer", directory / "tokenizer.partial"
    if not place.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        texts = [text for verse in verses for text in (verse.english, verse.spanish)]
        train_bpe(texts, config.vocab_size, (BOS, END), bos=BOS, eos=END, pad=END).save(unfinished)
        unfinished.rename(place)
    return Tokenizer.from_directory(place)


def rows(config: Config, tokenizer: Tokenizer, verses: Sequence[Verse]) -> packing.Table:
    pairs = [Pair(tokenizer.encode(v.english), tokenizer.encode(v.spanish)) for v in verses]
    fitting = [pair for pair in pairs if max(map(len, pair)) < config.length]
    return pack_pairs(fitting, config.length, tokenizer.bos_id, tokenizer.eos_id)


def run(config: Config, directory: Path) -> dict[str, float]:
    train, validation, test = split(config)
    tokenizer = tokenizer_of(config, train, directory)
    table, held_out = rows(config, tokenizer, train), rows(config, tokenizer, validation)
    model = seq2seq.Seq2Seq(
        transformer(
            config.vocab_size,
            config.layers,
            config.width,
            config.heads,
            config.ffn,
            dropout=config.dropout,
            residual=config.residual,
        )
    )
    size, filled = seq2seq.count_parameters(model), packing.fill_ratio(table)
    print(f"  {size:,} parameters, {len(table['tokens']):,} rows {filled:.0%} full", flush=True)

    def evaluate(params: Any) -> dict[str, float]:
        return {
            "nll": nll.held_out(
                model, params, packing.batches(held_out, config.batch_size)
            ).per_token
        }

    schedule = InverseSquareRoot.of_width(config.width, config.warmup_steps, config.rate)
    fitted = fit(
        next_token(model, label_smoothing=config.label_smoothing),
        source.supervised_source(table, config.batch_size, config.seed),
        seq2seq.init(model, jax.random.key(config.seed)),
        AdamW(schedule, weight_decay=0.0, b2=0.98, eps=1e-9),
        Training(
            config.steps,
            eval_every=config.eval_every,
            save_every=config.save_every,
            seed=config.seed,
            directory=directory,
        ),
        evaluate=evaluate,
        identity=dataclasses.replace(config, eval_every=None, save_every=1),
    )
    found = translations(config, model, fitted.params, tokenizer, test)
    write_samples(directory, test, found)
    scored = [
        {f"{name}/{score}": value for score, value in scores(test, said).items()}
        for name, said in found.items()
    ]
    return {"nll": fitted.evaluation["nll"], "parameters": size, **scored[0], **scored[1]}


def translations(
    config: Config, model: seq2seq.Seq2Seq, params: Any, tokenizer: Tokenizer, verses: list[Verse]
) -> dict[str, list[str]]:
    """What each search says for every verse; verses of like length are searched for together."""
    sources = [[*tokenizer.encode(verse.english), tokenizer.eos_id] for verse in verses]
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found = {name: [""] * len(sources) for name in SEARCHES}
    for name, beams in SEARCHES.items():
        search = Beams(
            beams, config.penalty, max_tokens=config.max_tokens, stop_ids=(tokenizer.eos_id,)
        )
        for first in range(0, len(order), config.batch_size):
            chosen = order[first : first + config.batch_size]
            batch = [sources[i] for i in chosen]
            said = translate(model, params, batch, tokenizer.bos_id, search, tokenizer.pad_id)
            for i, row in zip(chosen, said.rows(), strict=True):
                found[name][i] = tokenizer.decode(row)
    return found


def scores(verses: list[Verse], said: list[str]) -> dict[str, float]:
    """BLEU and chrF in percent, and the length of what was said over that of the references."""
    references = [[verse.spanish for verse in verses]]
    bleu, chrf = sacrebleu.corpus_bleu(said, references), sacrebleu.corpus_chrf(said, references)
    return {"bleu": bleu.score, "chrf": chrf.score, "length_ratio": bleu.sys_len / bleu.ref_len}


def write_samples(directory: Path, verses: list[Verse], found: dict[str, list[str]]) -> None:
    """Twelve verses, evenly spaced: for the report, greedy stands as `before`, beams as `after`."""
    lines = []
    for i in range(0, len(verses), max(1, len(verses) // 12)):
        verse = verses[i]
        prompt = f"{verse.english}\n{verse.spanish}"
        row = {"prompt": prompt, "before": found["greedy"][i], "after": found["beam4"][i]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (directory / "samples.jsonl").write_text("".join(lines))


def table(rows: list[results.Row]) -> str:
    """A line for each search, mean ± std over seeds."""
    lines = ["| search | BLEU | chrF | length ratio |", "| --- | --- | --- | --- |"]
    for group in results.groups(rows):
        for name in SEARCHES:
            cells = [group.statistic(f"{name}/{s}") for s in ("bleu", "chrf", "length_ratio")]
            lines.append("| " + " | ".join([name, *map(str, cells)]) + " |")
    return "\n".join(lines) + "\n"


BASE = Config()
SWEEP = param("seed", 0)
SMOKE = {
    "vocab_size": 300,
    "layers": 1,
    "width": 16,
    "heads": 2,
    "ffn": 24,
    "length": 256,
    "batch_size": 2,
    "steps": 2,
    "warmup_steps": 1,
    "train": 12,
    "test": 2,
    "max_tokens": 4,
    "eval_every": None,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
