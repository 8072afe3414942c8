"""The Source of reinforcement learning: it lets the policy answer, and hands out minibatches of that.

    fit(policy_gradient(model, loss), rollout_source(model, task, settings), params, optimizer, training)

A rollout and where we are in it are the source's state: they are saved with the parameters, and a run
that was killed in the middle of an epoch goes on bitwise. All shapes are fixed by the settings, so nothing
is compiled twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data import shuffle
from research.data.source import normalise
from research.decode.sampling import Sampling
from research.losses.advantages import (
    adaptive_coefficient,
    kl_estimate,
    shaped_rewards,
    whiten,
)
from research.objectives.reference import Reference
from research.rl import record
from research.rl.advantage import Estimator
from research.rl.play import Clock, play, scored
from research.rl.policy import scorer, without_critic
from research.rl.record import Rollout
from research.rl.tasks import Task, Transcript, visible
from research.types import Array, Batch, Params, Source

PROMPTS = 1 << 40  # Philox streams beyond those of epochs
FIELDS = (
    *("tokens", "targets", "segment_ids", "mask", "log_probs"),
    *("reference", "values", "advantages", "returns"),
)
# Given each new rollout with its number.
Keep = Callable[[int, Rollout], None]
# The step's number -> a batch of rows as `next_token` takes them.
Pretraining = Callable[[int], Batch]


@dataclass(frozen=True)
class Rollouts:
    """prompts × answers rows an iteration, `epochs` times over in `minibatches` each.

    kl            coefficient of the penalty −kl · (log π − log π_ref) on every token
    target_kl     nats an answer that the coefficient is adapted to (Ziegler et al.), over `horizon` answers
    whiten_rewards          to deviation 1, the mean kept
    missing_end             subtracted from the score of an answer that was cut off
    stop_kl       an iteration ends early once a minibatch is that far from the policy that sampled, nats a
                  token
    lr_kl         what the learning rate is adapted to: above twice of it two thirds of the rate, below half
                  of it one and a half times (`research.rl.rate.scaled_by_batch`)
    """

    prompts: int = 16
    answers: int = 1
    epochs: int = 4
    minibatches: int = 1
    temperature: float = 1.0
    estimator: Estimator = field(default_factory=Estimator)
    kl: float = 0.0
    kl_kind: str = "k1"
    target_kl: float | None = None
    horizon: int = 10_000
    whiten_rewards: bool = False
    missing_end: float = 0.0
    stop_kl: float | None = None
    lr_kl: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("prompts", "answers", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.rows % self.minibatches:
            raise ValueError(f"{self.rows} rows do not split into {self.minibatches} minibatches")
        if not self.temperature > 0:
            raise ValueError(
                f"a policy that learns is sampled at a temperature above 0, not {self.temperature}"
            )
        if self.target_kl is not None and not self.kl > 0:
            raise ValueError("a coefficient that is adapted to target_kl begins above 0: give kl")
        kl_estimate(np.zeros(1), np.zeros(1), self.kl_kind)  # says which kinds there are
        if self.answers == 1 and self.estimator.kind in ("rloo", "grpo"):
            raise ValueError(
                f"{self.estimator.kind} compares answers to one prompt: take 2 or more"
            )

    @property
    def rows(self) -> int:
        return self.prompts * self.answers

    @property
    def steps(self) -> int:
        """Of an iteration."""
        return self.epochs * self.minibatches


def rollout_source(
    model: Any,
    task: Task,
    settings: Rollouts,
    reference: Reference | None = None,
    pretraining: Pretraining | None = None,
    keep: Keep | None = None,
    clock: Clock | None = None,
    chunk: int | None = None,
) -> Source:
    """Minibatches for `research.rl.objective`. Without a `reference` the KL in rewards is 0, and there is none
    in the batch. ValueError for a penalty without one."""
    if reference is None and (settings.kl or settings.target_kl):
        raise ValueError("a KL penalty needs a reference policy")
    collect = _collector(model, task, settings, reference, clock or Clock(), chunk)

    def init(rng: Array) -> dict[str, Any]:
        return {
            "step": np.zeros((), np.int32),
            "iteration": np.full((), -1, np.int32),
            "place": np.full((), settings.steps, np.int32),
            "coefficient": np.full((), settings.kl, np.float32),
            "lr_scale": np.ones((), np.float32),
            "rollout": dict(vars(record.empty(settings.rows, task.length))),
            "facts": dict.fromkeys(record.STATISTICS, np.float32(0)),
        }

    def next(state, params, context, rng, last_metrics):
        state = {**state, **_adapted(settings, state, last_metrics)}
        if int(state["place"]) >= settings.steps:
            iteration = int(state["iteration"]) + 1
            rollout = collect(params, context, rng, iteration, float(state["coefficient"]))
            if keep is not None:
                keep(iteration, rollout)
            facts = {k: np.float32(v) for k, v in record.statistics(rollout).items()}
            state |= {
                "iteration": np.asarray(iteration, np.int32),
                "place": np.zeros((), np.int32),
                "rollout": dict(vars(rollout)),
                "facts": facts,
                "coefficient": _coefficient(settings, state["coefficient"], facts["kl"]),
            }
        batch = _minibatch(settings, state)
        if reference is None:
            del batch["reference"]
        step = int(state["step"])
        if pretraining is not None:
            batch |= {f"pretrain_{name}": v for name, v in pretraining(step).items()}
        place = np.asarray(int(state["place"]) + 1, np.int32)
        return batch, state | {"step": np.asarray(step + 1, np.int32), "place": place}

    return Source(init, next)


def _collector(model, task, settings, reference, clock, chunk) -> Callable[..., Rollout]:
    sampling = Sampling(
        temperature=settings.temperature, max_tokens=task.max_tokens, stop_ids=task.stop_ids
    )
    score = scorer(model, chunk)
    scores_of: dict[Any, Callable] = {}

    def of_reference(params: Params, context: Any, batch: Batch) -> np.ndarray:
        other, theirs = reference(model, without_critic(params), context)
        by = scores_of.setdefault(other, scorer(other, chunk))
        return np.asarray(by(theirs, batch).log_probs)

    def collect(params, context, rng, iteration, coefficient) -> Rollout:
        drawn = prompts_of(task, settings.seed, iteration, settings.prompts)
        asked = [prompt for prompt in drawn for _ in range(settings.answers)]
        with clock("generate"):
            transcripts, sampled = play(model, params, task, asked, sampling, rng)
        with clock("score"):
            scores = scored(task, transcripts)
        rows = [_row(t) for t in transcripts]
        batch = record.lay_out(rows, task.length, sampled)
        read = batch | {"temperature": np.float32(settings.temperature)}
        with clock("rescore"):
            said = jax.device_get(score(params, read))
            theirs = of_reference(params, context, read) if reference else said.log_probs
        ended = np.array([t.ended for t in transcripts], np.float32)
        fined = scores - settings.missing_end * (1 - ended)
        rewards = _rewards(settings, fined, said, theirs, batch, coefficient)
        advantages, returns = settings.estimator(
            rewards, jnp.asarray(said.values), batch["mask"], settings.answers
        )
        found = dict(
            batch,
            log_probs=said.log_probs,
            reference=theirs,
            values=said.values,
            scores=scores,
            ended=ended,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
        )
        return Rollout(**jax.device_get(found))

    return collect


def _rewards(settings, scores, said, theirs, batch, coefficient) -> Array:
    kl = kl_estimate(jnp.asarray(said.log_probs), jnp.asarray(theirs), settings.kl_kind)
    rewards = shaped_rewards(jnp.asarray(scores), kl, batch["mask"], coefficient)
    return whiten(rewards, batch["mask"], shift=False) if settings.whiten_rewards else rewards


def _row(t: Transcript) -> tuple[list[int], list[int]]:
    prompt = visible(t.prompt)
    return [*prompt, *t.ids], [*[0] * len(prompt), *t.chosen]


def prompts_of(task: Task, seed: int, iteration: int, count: int) -> list[list[int]]:
    """An iteration's prompts, of a stream apart from those that put data in order."""
    key = np.array([seed & shuffle.MASK, PROMPTS + iteration], np.uint64)
    return task.prompts(np.random.Generator(np.random.Philox(key=key)), count)


def _adapted(settings: Rollouts, state: dict, last_metrics: dict | None) -> dict[str, Any]:
    """What the last step's distance from the sampling policy decides."""
    if not last_metrics or "approximate_kl" not in last_metrics:
        return {}
    kl, found = float(last_metrics["approximate_kl"].value), {}
    if settings.stop_kl is not None and kl > settings.stop_kl:
        found["place"] = np.full((), settings.steps, np.int32)
    # An iteration's first minibatch is the sampling policy's own: its 0 says nothing about the rate.
    if settings.lr_kl is not None and int(state["place"]) > 1:
        by = 1.5 if kl < settings.lr_kl / 2 else 1 / 1.5 if kl > 2 * settings.lr_kl else 1.0
        found["lr_scale"] = np.float32(np.clip(state["lr_scale"] * by, 0.01, 10.0))
    return found


def _coefficient(settings: Rollouts, coefficient: np.ndarray, kl: float) -> np.ndarray:
    """The next rollout's."""
    if settings.target_kl is None:
        return coefficient
    found = adaptive_coefficient(
        float(coefficient), float(kl), settings.target_kl, settings.rows, settings.horizon
    )
    return np.asarray(found, np.float32)


def _minibatch(settings: Rollouts, state: dict) -> Batch:
    epoch, part = divmod(int(state["place"]), settings.minibatches)
    stream = int(state["iteration"]) * settings.epochs + epoch
    order = shuffle.permutation(settings.seed, stream, settings.rows)
    size = settings.rows // settings.minibatches
    items = order[part * size : (part + 1) * size]
    rollout = Rollout(**state["rollout"])
    rows = {name: getattr(rollout, name)[items] for name in FIELDS}
    batch = normalise({**rows, "weights": rows["mask"]})
    facts = {f"rollout/{name}": value for name, value in state["facts"].items()}
    batch["temperature"] = np.float32(settings.temperature)
    facts |= {
        "rollout/next_coefficient": state["coefficient"],
        "rollout/lr_scale": state["lr_scale"],
    }
    return batch | facts
