"""Does it matter that preferences are about the policy's own answers?  Guo et al. 2024 (arXiv:2402.04792); Xu et al.
2023 (arXiv:2312.16682).

A synthetic task with a known reward (experiments/shared/known_reward.py), which is the judge. All runs see the same
number of judged pairs and take the same steps of DPO; what differs is whose answers are judged: of the reference,
once (offline), of the policy every 32 steps (iterative) or every step (online); and online with exploration, at a
higher temperature or with a bonus for rare answers.

Differs from the papers: a decoder of two layers, a rule as the judge, no noise.
Run:    bash scripts/cpu.sh .venv/bin/python -m experiments.online_vs_offline_dpo --sweep
Expect: reward 0.7 to 0.8 offline, 0.99 iterative, 1 online, further from the reference in that order, all near one
        curve of reward by KL; a higher temperature changes nothing, the bonus keeps the policy from the end.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from experiments.shared import known_reward, text_policy
from experiments.shared.cells import cells, markdown
from research.losses.preference import dpo
from research.objectives import preference
from research.objectives.reference import in_context
from research.rl.online import Judged, judged_source
from research.runs import main, param, product, results

KINDS = {name: name for name in ("offline", "iterative", "online", "online, hot", "online, bonus")}


@dataclasses.dataclass(frozen=True)
class Config:
    """`steps` of `minibatch` pairs."""

    kind: str = "online"
    beta: float = 0.3
    steps: int = 128
    minibatch: int = 32
    lr: float = 1e-3
    answers: int = 512
    seed: int = 0


def judged(config: Config) -> Judged:
    every = {"offline": config.steps, "iterative": max(1, config.steps // 4)}.get(config.kind, 1)
    return Judged(
        prompts=config.minibatch * every,
        minibatch=config.minibatch,
        refresh=every,
        temperature=1.5 if config.kind == "online, hot" else 1.0,
        bonus=0.02 if config.kind == "online, bonus" else 0.0,
        seed=config.seed,
    )


def run(config: Config, directory: Path) -> dict[str, float]:
    model = text_policy.model(known_reward.SIZE)
    params = known_reward.trained(
        preference(model, partial(dpo, beta=config.beta), reference=in_context()),
        judged_source(model, known_reward.task(), judged(config)),
        config.lr,
        config.steps,
        config.seed,
        directory,
        config,
    )
    before = known_reward.measured(known_reward.reference(), config.answers)
    after = known_reward.measured(params, config.answers)
    return {"reward/before": before["reward"], "reward": after["reward"], "kl": after["kl"]}


def table(rows: list[results.Row]) -> str:
    """A line for each kind and β; mean over seeds ± their deviation."""
    found = cells(rows, BASE, kind=KINDS, beta={"0.3": 0.3, "1": 1.0})
    lines = []
    for (kind, beta), group in found.items():
        shown = [group.statistic(key) for key in ("reward", "kl")]
        lines.append([kind, beta, *map(str, shown)])
    start = next(iter(found.values())).statistic("reward/before").mean
    return markdown(["answers", "β", "reward", "KL, nats an answer"], lines) + (
        f"\nThe reference's reward is {start:.2f}, the greatest possible 1.\n"
    )


def figure(rows: list[results.Row]) -> Figure:
    """Reward against KL by kind."""
    found = cells(rows, BASE, kind=KINDS, beta={"0.3": 0.3, "1": 1.0})
    drawing = Figure(figsize=(5, 3.4), layout="constrained")
    axes = drawing.subplots()
    for number, kind in enumerate(KINDS):
        points = [
            (r["metrics"]["kl"], r["metrics"]["reward"])
            for (name, _), g in found.items()
            if name == kind
            for r in g.rows
        ]
        axes.plot(*zip(*points, strict=True), f"C{number}o", label=kind)
    axes.set_xlabel("KL from the reference, nats an answer")
    axes.set_ylabel("reward")
    axes.legend(frameon=False)
    return drawing


BASE = Config()
SWEEP = product(param("kind", *KINDS), param("beta", 0.3, 1.0), param("seed", 0, 1, 2))
SMOKE = {"steps": 2, "minibatch": 4, "answers": 16}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
