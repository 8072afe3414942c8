"""How much reward for how many nats from the reference?  Rafailov et al. 2023 (arXiv:2305.18290), Fig. 2 left.

A synthetic task with a known reward (experiments/shared/known_reward.py). DPO learns from 4,096 pairs of
the reference's own answers, labelled by the reward with Bradley and Terry's noise; PPO gets the true reward for
every answer that it samples, with a KL penalty. Each with four strengths β of staying near the reference. The
line to compare with is the best there is, π ∝ π_ref exp(8 r / β), exact for the Markov chain that the reference
has learned.

Differs from the paper: a decoder of two layers and a reward of digits instead of GPT-2 and a sentiment classifier.
Run:    bash scripts/cpu.sh .venv/bin/python -m experiments.dpo_vs_ppo_frontier --sweep
Expect: smaller β, further away and more reward, for both; below 2 nats DPO ahead, beyond that PPO, which goes on to
        0.8 where DPO's pairs end at 0.5; both below the best line, nowhere DPO above PPO throughout.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.shared import known_reward, text_policy
from experiments.shared.cells import cells, markdown
from research.data import source
from research.losses.preference import dpo
from research.objectives import preference
from research.objectives.reference import in_context
from research.rl.objective import Loss, policy_gradient
from research.rl.source import Rollouts, rollout_source
from research.runs import main, param, product, results

METHODS = {name: name for name in ("dpo", "ppo")}
BETAS = (0.1, 0.3, 1.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """β is DPO's, and PPO's penalty is β / 8: rewards were multiplied by 8 to draw labels."""

    method: str = "dpo"
    beta: float = 0.1
    pairs: int = 4096
    epochs: int = 2
    iterations: int = 100
    lr: float = 3e-4
    answers: int = 512
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    model = text_policy.model(known_reward.SIZE)
    if config.method == "ppo":
        made = Rollouts(prompts=64, epochs=2, minibatches=2, kl=config.beta / 8, seed=config.seed)
        objective = policy_gradient(model, Loss(value_weight=0.5))
        batches = rollout_source(model, known_reward.task(), made, in_context())
        steps = config.iterations * made.steps
    else:
        loss = partial(dpo, beta=config.beta)
        table = known_reward.offline_pairs(config.pairs, config.seed)
        objective = preference(model, loss, reference=in_context())
        batches = source.pair_source(table, 64, config.seed)
        steps = config.epochs * config.pairs // 64
    params = known_reward.trained(
        objective, batches, config.lr, steps, config.seed, directory, config, config.method == "ppo"
    )
    before = known_reward.measured(known_reward.reference(), config.answers)
    after = known_reward.measured(params, config.answers)
    return {"reward/before": before["reward"], "reward": after["reward"], "kl": after["kl"]}


def best(beta: float) -> tuple[float, float]:
    """(KL, reward) of π ∝ π_ref exp(8 r / β) where the reference is the chain: backwards for what is still
    to come, then forwards for where one is."""
    chain, worth, length = known_reward.chain(), known_reward.worth(), known_reward.LENGTH
    rest, policies = np.zeros(len(worth)), []
    for _ in range(length):
        logits = np.log(np.maximum(chain, 1e-300)) + 8 * worth / (length * beta) + rest
        rest = np.logaddexp.reduce(logits, axis=1)
        policies.append(np.exp(logits - rest[:, None]))
    where, kl, reward = np.full(len(worth), 1 / len(worth)), 0.0, 0.0
    for policy in reversed(policies):
        gap = np.where(
            policy > 0, np.log(np.maximum(policy, 1e-300) / np.maximum(chain, 1e-300)), 0
        )
        kl += where @ (policy * gap).sum(1)
        where = where @ policy
        reward += where @ worth / length
    return float(kl), float(reward)


def table(rows: list[results.Row]) -> str:
    """A line for each method and β; means over seeds."""
    found = cells(rows, BASE, method=METHODS, beta={f"{b:g}": b for b in BETAS})
    lines = [
        [method, beta, *(f"{group.statistic(key).mean:.2f}" for key in ("kl", "reward"))]
        for (method, beta), group in found.items()
    ]
    start = next(iter(found.values())).statistic("reward/before").mean
    return markdown(["method", "β", "KL, nats an answer", "reward"], lines) + (
        f"\nThe reference's reward is {start:.2f}, the greatest possible 1.\n"
    )


def figure(rows: list[results.Row]) -> Figure:
    """Reward against KL: each run a point, and the best there is."""
    found = cells(rows, BASE, method=METHODS, beta={f"{b:g}": b for b in BETAS})
    drawing = Figure(figsize=(5, 3.4), layout="constrained")
    axes = drawing.subplots()
    for colour, name in zip(("C0", "C1"), METHODS, strict=True):
        points = sorted(
            (r["metrics"]["kl"], r["metrics"]["reward"])
            for (method, _), g in found.items()
            if method == name
            for r in g.rows
        )
        axes.plot(*zip(*points, strict=True), f"{colour}o-", label=name, lw=0.8)
    axes.plot(
        *zip(*map(best, np.geomspace(0.05, 50, 60)), strict=True), "k--", label="the best there is"
    )
    axes.set_xlabel("KL from the reference, nats an answer")
    axes.set_ylabel("reward")
    axes.legend(frameon=False)
    return drawing


BASE = Config()
SWEEP = product(param("method", *METHODS), param("beta", *BETAS), param("seed", 0, 1))
SMOKE = {"pairs": 64, "epochs": 1, "iterations": 1, "answers": 16}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
