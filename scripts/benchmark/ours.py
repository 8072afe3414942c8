"""Our side of the benchmark: the public functions that experiments and the chat use.

    python -m scripts.benchmark.ours WORKLOAD MODE [THREADS]

Nothing here is faster than what a user gets: `generate`, and `make_step` with the fused loss. XLA
uses as many threads as the process may have cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research import hub
from research.data import packing, source
from research.data.supervised import Example, shift
from research.decode.generate import Generation, for_decoding, generate
from research.decode.sampling import Sampling
from research.models.decoder import Decoder, unstack
from research.objectives import next_token
from research.train.optim import AdamW, optimizer
from research.train.partition import partition
from research.train.state import initial_state
from research.train.step import make_step
from research.types import Batch, Params
from research.weights import lora
from scripts.benchmark.modes import RANK
from scripts.benchmark.worker import Repeat, seconds, serve

Work = dict[str, Any]
LIBRARIES = ("jax", "jaxlib", "flax", "optax")
ADAPTER = ((lora.TRAINABLE, True), (r".*", False))


def load(work: Work) -> tuple[Decoder, Params]:
    base = hub.load(work["model"])
    return base.model, base.params


def decode(work: Work, rows: int) -> tuple[dict[str, Any], Repeat]:
    """The time of `new_tokens` tokens after the first: that of all, less that of one alone."""
    model, params = load(work)
    params = for_decoding(params, donate=True)
    prompts, count = work["prompts"][:rows], work["sizes"]["new_tokens"]

    def continued(tokens: int) -> np.ndarray:
        sampling = Sampling(temperature=0.0, max_tokens=tokens)
        return generate(model, params, prompts, jax.random.key(0), sampling).tokens

    def repeat() -> dict[str, Any]:
        first, whole = seconds(partial(continued, 1)), seconds(partial(continued, count + 1))
        spent = {"seconds": whole - first, "whole_s": whole}
        return {**spent, "work": rows * count, "steps": count}

    continued(1)
    return {"tokens": continued(count + 1).tolist()}, repeat


def prefill(work: Work) -> tuple[dict[str, Any], Repeat]:
    """The prompt into a new cache, the logits of its last position, and the token they choose."""
    model, params = load(work)
    params, prompt = for_decoding(params, donate=True), work["prefill"]
    sampling = Sampling(temperature=0.0, max_tokens=1)

    def run() -> Generation:
        return generate(model, params, [prompt], jax.random.key(0), sampling)

    said = run()
    counts = {"work": len(prompt), "steps": 1, "tokens": len(prompt)}
    check = {"tokens": said.tokens[0].tolist(), "log_prob": float(said.log_probs[0, 0])}
    return check, lambda: {"seconds": seconds(run), **counts}


def full(work: Work) -> tuple[dict[str, Any], Repeat]:
    return training(work, [whole_batch(work["batch"])], r".*")


def adapter(work: Work) -> tuple[dict[str, Any], Repeat]:
    return training(work, [whole_batch(work["batch"])], ADAPTER, with_lora)


def rows(work: Work) -> tuple[dict[str, Any], Repeat]:
    """One repetition is all chosen rows once, packed."""
    check, repeat = training(work, packed_batches(work), ADAPTER, with_lora)

    def counted() -> dict[str, Any]:
        reply = repeat()
        return {**reply, "work": reply["supervised"]}

    return check, counted


def with_lora(params: Params) -> Params:
    return lora.add(params, r"stack_0/.*/kernel", jax.random.key(0), RANK, RANK)


def training(
    work: Work, batches: list[Batch], rule: Any, adapt: Callable[[Params], Params] | None = None
) -> tuple[dict[str, Any], Repeat]:
    """A repetition is one optimizer step for each batch. Check: the loss before the first step."""
    model, params = load(work)
    params = unstack(params if adapt is None else adapt(params))
    trainable, frozen = partition(params, rule)
    adamw = optimizer(AdamW(lr=1e-5, weight_decay=0.01, clip_norm=None), trainable)
    step = make_step(next_token(model), adamw)
    state = initial_state(trainable, adamw, jax.random.key(0))
    del trainable, params  # the state has its own copy
    counts = {
        "steps": len(batches),
        "tokens": sum(int(np.count_nonzero(batch["segment_ids"])) for batch in batches),
        "supervised": sum(int(np.count_nonzero(batch["weights"])) for batch in batches),
    }

    def run(batch: Batch) -> float:
        nonlocal state
        state, metrics = step(state, frozen, None, batch)
        return float(metrics["loss"].value)

    def repeat() -> dict[str, Any]:
        losses = []
        spent = seconds(lambda: losses.extend(run(batch) for batch in batches))
        return {"seconds": spent, "work": counts["tokens"], **counts, "loss": losses[-1]}

    return {"loss": run(batches[0])}, repeat


def whole_batch(windows: list[list[int]]) -> Batch:
    """Windows of text as a batch in which every token with a next one has a loss."""
    parts = [[shift(ids, [1] * len(ids))] for ids in windows]
    return source.normalise(packing.fill(parts, len(windows[0])))


def packed_batches(work: Work) -> list[Batch]:
    """The steps that `prepare.packed_rows` laid out."""
    types = (np.int32, np.int32, np.float32)
    chosen = [
        Example(*(np.asarray(e[f], t) for f, t in zip(Example._fields, types, strict=True)))
        for e in work["examples"]
    ]
    length = work["sizes"]["packed_length"]
    return [
        source.normalise(packing.fill([[chosen[i] for i in row] for row in step], length))
        for step in work["packed"]
    ]


MODES = {
    "decode1": partial(decode, rows=1),
    "decode8": partial(decode, rows=8),
    "prefill1024": prefill,
    "full4x256": full,
    "lora4x256": adapter,
    "rows": rows,
}

if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    serve(partial(MODES[sys.argv[2]], work), LIBRARIES)
