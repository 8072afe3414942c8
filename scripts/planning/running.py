"""Small steps that are really taken: what a plan is calibrated with on a CPU, and checked against."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import numpy as np

from research.kernels.attend import reference
from research.models.decoder import unstack
from research.models.families.llama import llama
from research.objectives import next_token
from research.plan.devices import Device, this_cpu
from research.plan.predict import predict
from research.plan.program import beginning, lowered, state_bytes
from research.plan.work import Method, Work
from research.types import Batch
from scripts.benchmark import limits

SMALL = llama(4096, 4, 512, 8, 4, 1408, max_length=512)


def reference_of(method: Method) -> Work:
    """A shallow step of a method: what it does between large products differs, and takes time."""
    return Work(SMALL, method, rows=4, length=128).deep((2,))


@dataclass
class Running:
    """A compiled step with real arrays. `step()` takes it and gives its seconds."""

    work: Work
    program: Any
    state: Any
    frozen: Any
    batch: Batch

    def step(self) -> float:
        start = time.perf_counter()
        self.state, metrics = self.program(self.state, self.frozen, None, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    @property
    def held_bytes(self) -> int:
        """Of the arrays that a step is given, as they are."""
        return state_bytes((self.frozen, self.state.trainable, self.state.opt_state, self.batch))

    @property
    def temporary_bytes(self) -> int:
        """Of the program that runs."""
        return self.program.memory_analysis().temp_size_in_bytes


def running(work: Work) -> Running:
    """`work` as experiments train it: scanned, with the fused loss, all of it under one jit."""
    params = jax.jit(work.initial)(jax.random.key(0))
    method, batch = work.method, random_batch(work)
    program = lowered(work.objective, method.optimizer, params, method.rule, batch).compile()
    state, frozen = beginning(method.optimizer, params, method.rule)
    return Running(work, program, state, frozen, batch)


def random_batch(work: Work) -> Batch:
    """Random tokens, every one with a loss."""
    rng, shape = np.random.default_rng(0), (work.rows, work.length)
    tokens = rng.integers(0, work.config.vocab_size, (2, *shape), dtype=np.int32)
    positions = np.broadcast_to(np.arange(work.length, dtype=np.int32), shape)
    return {
        "tokens": tokens[0],
        "targets": tokens[1],
        "segment_ids": np.ones(shape, np.int32),
        "positions": positions,
        "weights": np.full(shape, 1 / tokens[0].size, np.float32),
    }


def compiled_flops(work: Work) -> float:
    """XLA's count for the whole optimised step: all layers one after another, and no other loop."""
    config = dataclasses.replace(work.model.config, scan=False, attend=reference)
    objective = next_token(work.model.clone(config=config), fused=False)
    params = jax.eval_shape(unstack, work.parameters())
    method = work.method
    program = lowered(objective, method.optimizer, params, method.rule, work.batch())
    options = {"xla_backend_optimization_level": 0}
    return program.compile(compiler_options=options).cost_analysis()["flops"]


def in_turns(steps: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """Median seconds of each; they take turns after a first call that does not count."""
    for step in steps:
        step()
    times = [[step() for step in steps] for _ in range(rounds)]
    # Not the least: beside other programs a short step is undisturbed now and then, a long one never.
    return [median(column) for column in zip(*times, strict=True)]


def speeds() -> Device:
    """This machine with the speed of a large product and of copying, measured within seconds."""
    found = limits.measure(len(os.sched_getaffinity(0)), side=1024, words=1 << 24, tries=3)
    flop_s, bandwidth = 1e9 * found["matmul_gflop_s"], 1e9 * found["copy_gb_s"]
    return dataclasses.replace(this_cpu(), flop_s=flop_s, bandwidth=bandwidth, measured=True)


def calibrated(device: Device, method: Method, spent: float) -> Device:
    """`device` with the utilisation at which a method's reference takes `spent` seconds.

    RuntimeError when that is no more than its update alone should take.
    """
    cost = predict(reference_of(method), 1, device).cost
    model_s = spent - cost.update_bytes / device.bandwidth
    if model_s <= 0:
        raise RuntimeError(f"the reference step took {spent:.4f} s, less than its memory traffic")
    return dataclasses.replace(device, utilisation=cost.flops / model_s / device.flop_s)


def measured_cpu(method: Method, rounds: int = 5) -> Device:
    """This machine as a device: its limits, and what a small real step of `method` reaches of them."""
    spent = in_turns([running(reference_of(method)).step], rounds)[0]
    return calibrated(speeds(), method, spent)
