"""What a step of DPO costs beside supervised training on the same tokens.

    .venv/bin/python -m scripts.bench_preference [--layers 6] [--rows 2] [--length 512] [--repeats 7]

A row holds both answers of a pair, packed. DPO with a live reference, the policy without its LoRA, needs a forward
pass of the reference and a forward and backward pass of the policy; so it is held against a forward pass and
a gradient of the plain cross-entropy of the same rows. They take turns, one repetition each; medians, and
the median ratio of turns. SmolLM2-135M-Instruct's first layers with LoRA on every matrix.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import sft
from experiments.shared.first_layers import smollm2_layers
from research.losses.preference import dpo
from research.objectives import next_token, preference
from research.objectives.reference import without_adapter
from research.runs import environment
from research.train.partition import combine, partition
from research.types import Batch


def batch_of(rows: int, length: int, vocabulary: int) -> Batch:
    """Pairs of equal halves; the first quarter of each half is its prompt."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1))
    place = np.arange(length) % (length // 2)
    weights = np.tile((place >= length // 8).astype(np.float32), (rows, 1))
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "weights": weights / weights.sum(),
        "segment_ids": np.tile(1 + np.arange(length) // (length // 2), (rows, 1)).astype(np.int32),
        "positions": np.tile(place, (rows, 1)).astype(np.int32),
        "pair_weights": np.full(rows, 1 / rows, np.float32),
    }


def programs(layers: int | None, rows: int, length: int) -> dict[str, Callable[[], Any]]:
    """Three compiled functions without arguments."""
    base = smollm2_layers(layers)
    params, rule = sft.with_lora(base.params, sft.LINEAR, 16, 32.0, 0)
    trained, frozen = partition(params, rule)
    batch = jax.tree.map(jnp.asarray, batch_of(rows, length, base.model.config.vocab_size))
    plain = next_token(base.model)
    pairs = preference(base.model, dpo, reference=without_adapter)

    def value(objective: Callable) -> Callable:
        return lambda t, f, b: objective(combine(t, f), None, b, None)[0]

    made = {
        "forward": jax.jit(value(plain)),
        "gradient": jax.jit(jax.grad(value(plain))),
        "dpo": jax.jit(jax.grad(value(pairs))),
    }
    run = lambda f: lambda: jax.block_until_ready(f(trained, frozen, batch))  # noqa: E731
    return {name: run(f) for name, f in made.items()}


def measure(made: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats + 1):
        for name, run in made.items():
            start = time.perf_counter()
            run()
            if turn:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    turns = [d / (f + g) for f, g, d in zip(*times.values(), strict=True)]
    medians = {f"{name}_s": median(values) for name, values in times.items()}
    return {**medians, "ratio": median(turns), "lowest": min(turns), "highest": max(turns)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="all by default")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    row = measure(programs(options.layers, options.rows, options.length), options.repeats)
    print(json.dumps({**vars(options), **row, "cpu": environment.cpu_model()}))


if __name__ == "__main__":
    main()
