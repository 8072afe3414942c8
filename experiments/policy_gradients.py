"""What do baselines, critics and trust regions buy?  Seven policy gradients on one text environment.

A decoder of two layers learns from nothing to say three digits again (`research.rl.tasks.copy`, best score
1). REINFORCE (Williams 1992), the same less the batch's mean, actor–critic with GAE (arXiv:1506.02438), TRPO
(arXiv:1502.05477), PPO (arXiv:1707.06347), RLOO (arXiv:2402.14740) and GRPO (arXiv:2402.03300) draw the same
number of answers an iteration, RLOO and GRPO four to a prompt. PPO and GRPO use them several times over,
the others once.

Measured: score of the sampled policy by iteration and over the last ten; answers until its mean over five
iterations was 90 % of the best. And how far a method's gradient can be trusted: for one half-trained policy,
the same for all, the mean cosine between gradients of −A log π of independent batches.

Differs from the papers: tiny task and model; GRPO without a reference and its KL; TRPO without a critic and with
5 iterations of conjugate gradients. Adam's rate is 3e-3 for a step an iteration and 2e-3 for sixteen.
Run:    bash scripts/cpu.sh .venv/bin/python -m experiments.policy_gradients --sweep   (7 methods x 5 seeds)
Expect: PPO alone solves the task with all seeds (0.97, after 5,900 answers); GRPO is as fast at first and then
        unstable (0.54 to 0.96). Those that take one step stay at 0.75 or below: all digits and no end. Without a
        baseline gradients hardly agree (0.16 for 0.65 to 0.70 with one), and learning is slow.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from experiments.shared import text_policy
from experiments.shared.cells import cells, markdown
from research.rl.advantage import Estimator
from research.rl.objective import Loss, policy_gradient
from research.rl.policy import without_critic
from research.rl.record import Rollout
from research.rl.source import Rollouts, rollout_source
from research.rl.tasks import copy
from research.rl.trpo import trpo
from research.runs import main, param, product, results
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.types import Params

TASK = copy()
MODEL = text_policy.model(TASK.size)
POINTS, BATCHES = 10, 16  # of a curve; whose gradients are compared


@dataclasses.dataclass(frozen=True)
class Method:
    """`advantages`: a kind of `Estimator`; `clipped`: PPO's loss instead of −A log π; `lr` None is TRPO's own
    step; `steps` (epochs, minibatches) of an iteration's answers."""

    advantages: str
    whiten: bool = False
    clipped: bool = False
    lr: float | None = 3e-3
    answers: int = 1
    steps: tuple[int, int] = (1, 1)
    critic: bool = False

    @property
    def loss(self) -> Loss:
        kind = "ppo" if self.clipped else "reinforce"
        return Loss(kind, entropy_weight=0.01, value_weight=0.5, value_clip=None)

    def rollouts(self, batch: int, seed: int) -> Rollouts:
        epochs, minibatches = self.steps
        return Rollouts(
            prompts=batch // self.answers,
            answers=self.answers,
            epochs=epochs,
            minibatches=minibatches,
            estimator=Estimator(self.advantages, whiten=self.whiten),
            seed=seed,
        )


SEVERAL = {"clipped": True, "lr": 2e-3, "steps": (4, 4)}
METHODS = {
    "REINFORCE": Method("reinforce"),
    "with baseline": Method("baseline"),
    "actor–critic": Method("gae", critic=True),
    "RLOO": Method("rloo", answers=4),
    "TRPO": Method("baseline", whiten=True, lr=None),
    "PPO": Method("gae", critic=True, **SEVERAL),
    "GRPO": Method("grpo", answers=4, **SEVERAL),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """`batch`: answers of an iteration."""

    method: Method = METHODS["PPO"]
    batch: int = 128
    iterations: int = 80
    seed: int = 0


def train(config: Config) -> tuple[Params, np.ndarray]:
    """The parameters, and the mean score of each iteration's answers."""
    method, scores = config.method, []
    settings = method.rollouts(config.batch, config.seed)

    def keep(iteration: int, rollout: Rollout) -> None:
        scores.append(float(rollout.scores.mean()))

    fitted = fit(
        policy_gradient(MODEL, method.loss),
        rollout_source(MODEL, TASK, settings, keep=keep),
        text_policy.start(MODEL, config.seed, method.critic),
        trpo(MODEL, iterations=5) if method.lr is None else AdamW(method.lr, weight_decay=0.0),
        Training(config.iterations * settings.steps, log_every=None, seed=config.seed),
    )
    return fitted.params, np.array(scores)


@cache
def half_way(batch: int, iterations: int) -> Params:
    """A policy on its way, with its critic."""
    return train(Config(batch=batch, iterations=iterations))[0]


@jax.jit
def gradient(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """Of −A log π alone, whatever the method's own loss is."""
    loss = Loss("reinforce", value_weight=0.0)
    value = lambda p: policy_gradient(MODEL, loss)({**params, **p}, None, batch, None)[0]  # noqa: E731
    return ravel_pytree(jax.grad(value)(without_critic(params)))[0]


def agreement(method: Method, params: Params, batch: int, seed: int) -> float:
    """Mean cosine between the gradients of independent batches of the same policy."""
    settings = dataclasses.replace(method.rollouts(batch, seed), epochs=1, minibatches=1)
    source, found = rollout_source(MODEL, TASK, settings), []
    state = source.init(jax.random.key(seed))
    for i in range(BATCHES):
        rng = jax.random.fold_in(jax.random.key(seed), i)
        rows, state = source.next(state, params, None, rng, None)
        g = np.asarray(gradient(params, rows))
        found.append(g / max(float(np.linalg.norm(g)), 1e-12))
    total = np.sum(found, 0)
    return float((total @ total - BATCHES) / (BATCHES * (BATCHES - 1)))


def run(config: Config, directory: Path) -> dict[str, float]:
    _, scores = train(config)
    smooth = np.convolve(scores, np.ones(5) / 5)[4 : len(scores)]
    reached = np.flatnonzero(smooth >= 0.9 * TASK.best)
    found = {
        "score": float(scores[-10:].mean()),
        "reached": float(len(reached) > 0),
        "agreement": agreement(
            config.method,
            half_way(config.batch, max(config.iterations // 4, 1)),
            config.batch,
            config.seed,
        ),
    }
    if len(reached):
        found["answers"] = float((reached[0] + 5) * config.batch)
    parts = np.array_split(scores, min(POINTS, len(scores)))
    return found | {f"curve/{i:03d}": float(part.mean()) for i, part in enumerate(parts)}


def table(rows: list[results.Row]) -> str:
    """A line for each method; mean and deviation over seeds."""
    lines = []
    for (name,), group in cells(rows, BASE, method=METHODS).items():
        reached = int(sum(results.metrics(row)["reached"] for row in group.rows))
        answers = f"{group.statistic('answers').mean:,.0f}" if reached else "–"
        values = [str_of(group.statistic(key)) for key in ("score", "agreement")]
        lines.append([name, *values, f"{reached} of {len(group.rows)}", answers])
    heads = ["method", "score", "agreement of gradients", "reached 90 %", "after answers"]
    return markdown(heads, lines) + (
        f"\nMean ± standard deviation over seeds; {BASE.iterations * BASE.batch:,} answers each. `score`: of the "
        "last ten iterations' answers; `after answers`: of the runs that reached it.\n"
    )


def str_of(value: results.Statistic) -> str:
    return f"{value.mean:.3f} ± {value.std or 0:.3f}"


def figure(rows: list[results.Row]) -> Figure:
    """Score by answers drawn, mean and range of the seeds."""
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    for (name,), group in cells(rows, BASE, method=METHODS).items():
        curves = np.array([[v for k, v in curve_of(row)] for row in group.rows])
        x = (np.arange(curves.shape[1]) + 0.5) * BASE.iterations * BASE.batch / curves.shape[1]
        (line,) = axes.plot(x, curves.mean(0), marker=".", label=name)
        axes.fill_between(x, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.12)
    axes.set(xlabel="answers", ylabel="score", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize="small")
    return drawing


def curve_of(row: results.Row) -> list[tuple[str, float]]:
    return sorted((k, v) for k, v in results.metrics(row).items() if k.startswith("curve/"))


BASE = Config()
SWEEP = product(param("method", *METHODS.values()), param("seed", 0, 1, 2, 3, 4))
SMOKE = {"batch": 16, "iterations": 2}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
