"""A whole training step on this device: tokens a second, memory, and the share of the peak that is used.

    python -m scripts.bench train --preset llama-3.2-1b --length 2048 --batch 8 [--attend flash2]
    python -m scripts.bench train --preset smollm2-135m --layers 2 --length 64 --batch 2      on a CPU

AdamW over random float32 parameters, bfloat16 in between on a GPU; layers are computed again in the
backward pass unless `--keep`. MFU is that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B):
6 FLOPs for each parameter that multiplies and 12·N·H·T for each layer, a token; what is computed again
does not count. Peak memory is the compiler's own account of the step's program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from research.kernels.select import KERNELS, kernel, picked
from research.models import decoder
from research.models.decoder import Decoder, DecoderConfig
from research.models.families import PRESETS
from research.objectives import next_token
from research.paths import named_leaves
from research.plan.program import memory_of
from research.runs import environment
from research.train.optim import AdamW, optimizer
from research.train.state import initial_state
from research.train.step import make_step
from research.types import Batch, Params
from scripts.benchmark.attention import PEAK


def configured(options: argparse.Namespace, on_gpu: bool) -> DecoderConfig:
    config = PRESETS[options.preset]
    changes: dict[str, Any] = {
        "attend": kernel(options.attend),
        "remat": None if options.keep else "full",
    }
    if on_gpu:
        changes["dtype"] = jnp.bfloat16
    if options.layers:
        changes["stacks"] = (dataclasses.replace(config.stacks[0], count=options.layers),)
    return dataclasses.replace(config, **changes)


def flops_per_token(config: DecoderConfig, params: Params, T: int) -> float:
    """Of a forward and backward pass of a model of one kind of layer; a tied table counts once, as the
    head it multiplies as."""
    sizes = {path: leaf.size for path, leaf in named_leaves(params)}
    multiplied = sum(size for path, size in sizes.items() if path.endswith("kernel"))
    if "head/kernel" not in sizes:
        multiplied += sizes["embed/table"]
    block = config.stacks[0].pattern[0].attention
    layers = sum(stack.count * len(stack.pattern) for stack in config.stacks)
    return 6.0 * multiplied + 12.0 * layers * block.heads * block.head_size * T


def batch_of(config: DecoderConfig, rows: int, T: int) -> Batch:
    tokens = jax.random.randint(jax.random.key(1), (rows, T + 1), 0, config.vocab_size)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((rows, T))}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = jax.default_backend() == "gpu"
    config = configured(options, on_gpu)
    model = Decoder(config)
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(0))
    adam = optimizer(AdamW(1e-4), params)
    step, state = make_step(next_token(model), adam), initial_state(params, adam, jax.random.key(2))
    flops = flops_per_token(config, params, options.length)
    frozen = jax.tree.map(lambda leaf: None, params)
    del params
    batch, times = batch_of(config, options.batch, options.length), []
    start = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state, frozen, None, batch).compile()
    compiling = time.perf_counter() - start
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        state, metrics = program(state, frozen, None, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    first, *times = times
    speed = options.batch * options.length / median(times)
    kind = jax.devices()[0].device_kind
    peak = next((p for known, p in PEAK.items() if known in kind), None)
    return {
        "preset": options.preset,
        "layers": sum(stack.count for stack in config.stacks),
        "batch": options.batch,
        "length": options.length,
        "device": kind,
        "attention": picked() if options.attend == "auto" else options.attend,
        "first_step_s": compiling + first,
        "step_s": median(times),
        "tokens_per_s": speed,
        "tflops": speed * flops / 1e12,
        "mfu": None if peak is None else speed * flops / 1e12 / peak,
        "peak_bytes": memory_of(program)["peak_bytes"],
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench train", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="llama-3.2-1b", metavar="NAME")
    add("--attend", choices=sorted(KERNELS), default="auto")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=2048)
    add("--layers", type=int, help="only so many; all by default")
    add("--steps", type=int, default=10)
    add("--keep", action="store_true", help="keep activations, compute nothing again")
    add("--output", type=Path, help="append the JSON line to this file")
    options = parser.parse_args(arguments)
    row = {**measure(options), "versions": environment.versions(), "git": environment.commit()}
    print(json.dumps(row))
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
