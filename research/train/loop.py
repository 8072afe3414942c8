"""The one training loop: pretraining, fine-tuning, rewards, preferences, RL, distillation, continual
learning. What differs between them is the objective and the Source.

A run with a directory goes on by itself from its newest sound checkpoint, and ends bitwise where an
uninterrupted run would: parameters, optimizer state, source state and the metrics the Source sees
are all restored, and randomness is a function of the seed and the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any

import optax
from jax.sharding import Mesh

from research.runs.canonical import to_json
from research.train.average import SWA
from research.train.directory import Nowhere, Progress, RunDirectory, digests, shapes
from research.train.finite import diagnose, wrong_values
from research.train.interrupt import Interrupted, StopRequest
from research.train.metrics import Meter, ProgressBar
from research.train.optim import Config, Paged
from research.train.optim import optimizer as make_optimizer
from research.train.partition import Rule, combine
from research.train.placement import place, start
from research.train.retention import Best
from research.train.sharding import shard_batch, sharding_of
from research.train.state import TrainState, source_rng
from research.train.step import Step, make_step
from research.train.stopping import EarlyStopping
from research.types import Objective, Params, PyTree, Source

Evaluate = Callable[[Params], Mapping[str, float]]


@dataclass(frozen=True)
class Training:
    """How long, how often, and where.

    steps        optimizer steps in all, those before a resume included
    accumulate   micro-batches per step
    log_every, eval_every, save_every   in steps; None is never (an evaluation and a save still come
                 at the end, when there is an `evaluate` and a directory)
    keep         newest checkpoints that stay; keep_best adds the best by an evaluation metric, which
                 is then saved whenever an evaluation is the best so far
    ema_decay    keeps a moving average of the trained leaves, which is what gets evaluated
    swa          keeps their mean over the last steps instead
    early_stopping   ends the run before `steps` once evaluations get no better
    directory    None keeps everything in memory
    """

    steps: int
    accumulate: int = 1
    log_every: int | None = 10
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    keep_best: Best | None = None
    ema_decay: float | None = None
    swa: SWA | None = None
    early_stopping: EarlyStopping | None = None
    seed: int = 0
    directory: str | Path | None = None

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "eval_every", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Training.{name} must be at least 1, not {value}")
        if self.directory is None and (self.save_every or self.keep_best):
            raise ValueError("Training.save_every and keep_best need Training.directory")
        if self.ema_decay is not None and self.swa is not None:
            raise ValueError("Training.ema_decay and swa are two averages; give one")
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("Training.early_stopping needs Training.eval_every")

    @property
    def averages(self) -> bool:
        return self.ema_decay is not None or self.swa is not None


@dataclass(frozen=True)
class Fitted:
    """params: trained and frozen leaves together; ema: the same with averaged leaves (`ema_decay`
    or `swa`), or None;
    evaluation: the last one, empty when there was none."""

    params: Params
    ema: Params | None
    state: TrainState
    evaluation: dict[str, float]


def fit(
    objective: Objective,
    source: Source,
    params: Params,
    optimizer: Config | optax.GradientTransformation,
    config: Training,
    *,
    rule: Rule = ".*",
    context: Any = None,
    evaluate: Evaluate | None = None,
    mesh: Mesh | None = None,
    names: PyTree | None = None,
    units: Mapping[str, int] | None = None,
    identity: Any = None,
) -> Fitted:
    """Train the leaves of `params` that `rule` selects; the caller's arrays are left as they are.

    `identity` is whatever else decides the course of the run (model, data): a config of plain
    values. With the seed, accumulation, optimizer, rule, shapes and a hash of every frozen leaf it is
    written to the directory, and a directory with checkpoints of another run is refused. (What the
    trained leaves start from and what `context` holds is not hashed.)

    `mesh` shards the batch over data and fsdp, and the parameters as `names` says, split in whole
    `units` ({"heads": H}; see `shardings`), or as they already are when there are no names. What a
    Source gets as params is donated by the step that follows: it must not keep them.

    Raises NonFiniteError when a loss, gradient or update is not finite, CheckpointError when a checkpoint
    cannot be written or none can be read, OtherRunError for another run's directory,
    InUseError when another process is running in it, Interrupted after a SIGTERM or SIGINT, with the state saved.
    """
    if config.keep_best is not None and evaluate is None:
        raise ValueError("Training.keep_best needs an `evaluate`")
    if config.early_stopping is not None and evaluate is None:
        raise ValueError("Training.early_stopping needs an `evaluate`")
    if mesh is not None and isinstance(optimizer, Paged):
        raise ValueError("a paged optimizer's state lies beside one device; train without a mesh")
    trainable, frozen, context = place(params, context, rule, mesh, names, units)
    update = optimizer
    if isinstance(optimizer, Config):
        update = make_optimizer(optimizer, trainable)
    state = start(trainable, update, source, config.seed, config.averages, mesh)
    homes = None if mesh is None else sharding_of(state.replace(source_state=None))
    step = make_step(
        objective, update, config.accumulate, config.ema_decay, mesh, homes, config.swa
    )
    parts = _Parts(
        objective=objective,
        source=source,
        config=config,
        evaluate=evaluate,
        mesh=mesh,
        step=step,
        frozen=frozen,
        context=context,
        records=_records(config, optimizer, rule, trainable, frozen, identity),
    )
    try:
        return _train(parts, state)
    finally:
        parts.records.close()


@dataclass(frozen=True)
class _Parts:
    """What stays the same during one `fit`."""

    objective: Objective
    source: Source
    config: Training
    evaluate: Evaluate | None
    mesh: Mesh | None
    step: Step
    frozen: Params
    context: Any
    records: RunDirectory | Nowhere


def _train(parts: _Parts, state: TrainState) -> Fitted:
    config, records = parts.config, parts.records
    now = records.resume(state)
    del state  # the step donates; only `now` holds the state
    if now.step > config.steps:
        raise ValueError(f"{config.directory} is at step {now.step}, past steps={config.steps}")
    meter, bar = Meter(), ProgressBar(config.steps, now.step)
    evaluation = now.evaluation
    try:
        with StopRequest() as stop:
            while now.step < config.steps and not _stopped(config, now):
                now = _one_step(parts, now)
                now = _report(parts, now, meter, bar)
                evaluation = now.evaluation or evaluation
                if stop.signal is not None:
                    _leave(parts, now, bar, stop.signal)
        if parts.evaluate is not None and now.evaluation is None:
            now = _evaluated(parts, now, meter, bar)
    finally:
        bar.close()
    records.finish()
    return _fitted(parts, now, now.evaluation or evaluation)


def _one_step(parts: _Parts, now: Progress) -> Progress:
    state, accumulate = now.state, parts.config.accumulate
    params = combine(state.trainable, parts.frozen)
    rng = source_rng(state.rng, now.step)
    batch, source_state = parts.source.next(
        state.source_state, params, parts.context, rng, now.last_metrics
    )
    if parts.mesh is not None:
        batch = shard_batch(batch, parts.mesh, accumulate)
    del params  # donated next
    state = state.replace(source_state=source_state)
    state, metrics = parts.step(state, parts.frozen, parts.context, batch)
    if wrong := wrong_values(metrics):
        raise diagnose(
            parts.objective, state, parts.frozen, parts.context, batch, accumulate, wrong
        )
    return Progress(state, now.step + 1, metrics, waiting=now.waiting)


def _report(parts: _Parts, now: Progress, meter: Meter, bar: ProgressBar) -> Progress:
    """Log, evaluate and save where the step is due; all of it after the last step."""
    config, records, last = parts.config, parts.records, now.step == parts.config.steps
    meter.add(now.last_metrics)
    bar.advance(now.step)
    if last or _due(now.step, config.log_every):
        row = meter.row(now.step)
        bar.show(row)
        records.write(row)
    save = last or _due(now.step, config.save_every)
    if parts.evaluate is not None and (last or _due(now.step, config.eval_every)):
        now = _evaluated(parts, now, meter, bar)
        save |= records.is_best(now.evaluation)
        if not last and _stopped(config, now):
            _stop_early(parts, now, bar)
            save = True
    records.check()
    if save:
        records.save(now)
    return now


def _evaluated(parts: _Parts, now: Progress, meter: Meter, bar: ProgressBar) -> Progress:
    started = time.perf_counter()
    average = now.state.trainable if now.state.ema is None else now.state.ema
    values = parts.evaluate(combine(average, parts.frozen))
    evaluation = {name: float(value) for name, value in values.items()}
    parts.records.write({"step": now.step, "split": "eval", **evaluation})
    shown = "  ".join(f"{name} {value:.4f}" for name, value in evaluation.items())
    bar.say(f"step {now.step}  evaluation: {shown}")
    meter.pause(time.perf_counter() - started)
    stopping = parts.config.early_stopping
    waiting = now.waiting if stopping is None else stopping.after(now.waiting, evaluation)
    return replace(now, evaluation=evaluation, waiting=waiting)


def _stopped(config: Training, now: Progress) -> bool:
    return config.early_stopping is not None and config.early_stopping.stops(now.waiting)


def _stop_early(parts: _Parts, now: Progress, bar: ProgressBar) -> None:
    count = now.waiting.evaluations
    parts.records.write({"step": now.step, "split": "stop", "evaluations_without_a_better": count})
    bar.say(f"stopped early after step {now.step}: {count} evaluations without a better one")


def _leave(parts: _Parts, now: Progress, bar: ProgressBar, signal: Signals) -> None:
    parts.records.save(now)
    bar.say(f"{signal.name}: stopped after step {now.step}; {parts.records.finish()}")
    raise Interrupted(128 + signal)


def _fitted(parts: _Parts, now: Progress, evaluation: dict[str, float] | None) -> Fitted:
    state = now.state
    ema = None if state.ema is None else combine(state.ema, parts.frozen)
    return Fitted(combine(state.trainable, parts.frozen), ema, state, evaluation or {})


def _records(config: Training, *decisive: Any) -> RunDirectory | Nowhere:
    if config.directory is None:
        return Nowhere()
    identity = _identity(config, *decisive)  # hashes the frozen leaves: only where it is kept
    return RunDirectory(Path(config.directory), identity, config.keep, config.keep_best)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _identity(config: Training, optimizer, rule, trainable, frozen, identity) -> dict[str, Any]:
    """What decides where the run goes. How often it logs or saves, and its length, do not: a
    schedule that depends on the length says so itself."""
    ours = isinstance(optimizer, Config)
    training = {name: getattr(config, name) for name in ("seed", "accumulate", "ema_decay")}
    if config.swa is not None:
        training["swa"] = to_json(config.swa)
    return {
        "training": training,
        "optimizer": to_json(optimizer) if ours else "an optax transformation",
        "rule": to_json(rule),
        "trainable": shapes(trainable),
        "frozen": digests(frozen),
        "identity": to_json(identity),
    }
