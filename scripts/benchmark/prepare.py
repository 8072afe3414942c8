"""The same weights and the same tokens for both sides, written once into the cache.

    python -m scripts.benchmark.prepare [--quick]      prints the path of the workload

SmolLM2-135M-Instruct, its 4-bit weights made dense in float32, goes into a Hugging Face directory
that both load. The workload is a JSON file: sizes, prompts, a batch, and the instruction rows as
token ids, so that no tokenizer takes part in what is measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from research import hub
from research.data import corpora, formats, packing, supervised
from research.data.supervised import Example
from research.hub.download import SMOLLM2_SHA256, cache_directory, smollm2
from research.tokenize import chat
from research.tokenize.tokenizer import Tokenizer
from scripts.benchmark.modes import FULL, QUICK

ROWS = 256  # the first ones of the English Alpaca rows, in order
BATCH = 8
LONGEST = 512


def model_directory() -> Path:
    """The dequantized model as a directory, saved once."""
    path = cache_directory() / "bench" / f"smollm2-{SMOLLM2_SHA256[:12]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        hub.save(path, hub.load(smollm2()))
    return path


def examples(tokenizer: Tokenizer) -> list[Example]:
    """The first rows through the model's chat template, loss on answers, at most 512 tokens."""
    conversations = list(formats.conversations(list(corpora.alpaca_en())[:ROWS]))
    encode = partial(chat.encode_chat, tokenizer)
    kept, counts = supervised.examples(conversations, encode, LONGEST)
    if counts.kept != ROWS:
        raise ValueError(f"{ROWS} rows should all have a supervised token: {counts}")
    return kept


def answers(tokenizer: Tokenizer, wanted: int) -> list[int]:
    """The first `wanted` tokens of the data set's answers, one after another."""
    ids: list[int] = []
    for _, row in corpora.alpaca_en():
        ids += tokenizer.encode(row["output"])
        if len(ids) >= wanted:
            return ids[:wanted]
    raise ValueError(f"the answers have only {len(ids)} tokens, fewer than {wanted}")


def workload(directory: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Everything both workers need: plain lists and numbers."""
    tokenizer = Tokenizer.from_directory(directory)
    text = answers(tokenizer, max(sizes["prefill"], 8 * sizes["prompt"], 4 * sizes["length"]))
    chosen = select(examples(tokenizer), sizes["batches"])
    return {
        "model": str(directory),
        "sizes": sizes,
        "prompts": windows(text, 8, sizes["prompt"]),
        "prefill": text[: sizes["prefill"]],
        "batch": windows(text, sizes["rows"], sizes["length"]),
        "examples": [{k: v.tolist() for k, v in e._asdict().items()} for e in chosen],
        "packed": packed_rows([len(e.tokens) for e in chosen], sizes),
    }


def windows(ids: Sequence[int], rows: int, length: int) -> list[list[int]]:
    return [list(ids[i * length : (i + 1) * length]) for i in range(rows)]


def select(rows: Sequence[Example], batches: Sequence[int]) -> list[Example]:
    """The rows of those batches of 8."""
    return [rows[BATCH * batch + i] for batch in batches for i in range(BATCH)]


def packed_rows(lengths: Sequence[int], sizes: dict[str, Any]) -> list[list[list[int]]]:
    """Indices of the chosen examples: a list for each packed row, a list of rows for each step.

    Every step has the same number of rows, as a compiled step needs; empty ones fill the last.
    """
    rows, per_step = packing.best_fit(lengths, sizes["packed_length"]), sizes["packed_rows"]
    rows += [[]] * (-len(rows) % per_step)
    return [rows[i : i + per_step] for i in range(0, len(rows), per_step)]


def describe(work: dict[str, Any]) -> str:
    """How much of the rows is padding and how much has loss."""
    lengths = np.array([len(e["tokens"]) for e in work["examples"]])
    padded = lengths.reshape(-1, BATCH).max(1).sum() * BATCH
    loss = sum(np.count_nonzero(e["weights"]) for e in work["examples"])
    sizes = work["sizes"]
    packed = len(work["packed"]) * sizes["packed_rows"] * sizes["packed_length"]
    return (
        f"{len(lengths)} rows: {lengths.sum()} tokens, {loss} supervised; {padded} positions in "
        f"padded batches of {BATCH}, {packed} packed in {len(work['packed'])} steps of "
        f"{sizes['packed_rows']}×{sizes['packed_length']}"
    )


def main(quick: bool) -> Path:
    directory = model_directory()
    work = workload(directory, QUICK if quick else FULL)
    path = directory.parent / f"workload{'-quick' if quick else ''}.json"
    partial_path = path.with_name(f"{path.name}.{os.getpid()}")
    partial_path.write_text(json.dumps(work))
    os.replace(partial_path, path)
    print(describe(work), file=sys.stderr)
    return path


if __name__ == "__main__":
    print(main("--quick" in sys.argv[1:]))
