"""Supervised fine-tuning, a reward model, PPO: InstructGPT's three steps on a real model (Ouyang et al. 2022,
arXiv:2203.02155; Ziegler et al. 2019, arXiv:1909.08593).

1. SmolLM2-135M-Instruct is tuned a little on the chosen answers of real English pairs, with LoRA, merged then.
2. Two reward models, first 8 layers each, learn from halves of the pairs that share no prompt: one is the reward,
   the other one judges in the end and is never optimised.
3. PPO with another LoRA: the policy answers short instructions of Alpaca, `prompts` × `answers` an iteration, at
   most `tokens` tokens. A critic on the policy's states, GAE, a KL penalty to the model of step 1, which is the policy
   without its adapter. Rewards are in deviations of the answers before PPO.

Measured on other instructions, before and after: both rewards, and what is said; and of every rollout both rewards and
the KL, which shows whether the reward is exploited. Where the time goes: `time/`, shares of PPO's iterations.

Differs from the paper: 135M parameters, 150 pairs a reward model, answers of `tokens` tokens, a few hundred
answers in all, LoRA in every step, no pretraining mix (the objective has it).
Run:    .venv/bin/python -m experiments.rlhf_smollm2 --sweep
Expect: on other instructions half a deviation more by either reward model, at 2 to 3 nats an answer; text that
        reads no better, or worse, since what both models like is not what a reader would.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.shared import rlhf, sft
from experiments.shared.cells import cells, markdown
from experiments.shared.reward_training import Recipe
from experiments.shared.rlhf import Prompt
from experiments.shared.samples import side_by_side
from research import hub
from research.decode.generate import generate
from research.decode.sampling import Sampling
from research.objectives.reference import without_adapter
from research.rewards import Reward, normalised
from research.rl import record
from research.rl.advantage import Estimator
from research.rl.objective import Loss, policy_gradient
from research.rl.play import Clock
from research.rl.policy import CRITIC, with_critic, without_critic
from research.rl.record import Rollout
from research.rl.source import Rollouts, rollout_source
from research.rl.tasks import Task
from research.runs import main, param, results
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Params

SAMPLES, SHOWN = 4, 12  # in the table of samples, and kept
EACH = 8  # answers to each held-out instruction
TIME = "time.json"


@dataclasses.dataclass(frozen=True)
class Config:
    sft_steps: int = 12
    recipe: Recipe = Recipe(steps=60)
    reward_layers: int = 8
    iterations: int = 16
    prompts: int = 8
    answers: int = 2
    epochs: int = 2
    tokens: int = 40
    lr: float = 4e-4
    kl: float = 0.05
    rank: int = 8
    layers: int | None = None
    held_out: int = 16
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    base = rlhf.tuned(config.sft_steps, config.rank, config.layers, directory)
    both = rlhf.judges(config.recipe, config.reward_layers)
    learn, kept = rlhf.instructions(config.held_out)
    one = answers(base, base.params, kept, config.tokens, 1)
    scales = [(float(x.mean()), float(x.std()) + 1e-6) for x in (r(*one) for r in both)]
    judges = [normalised(r, *scale) for r, scale in zip(both, scales, strict=True)]
    asked = rlhf.task(base, learn, judges[0], config.tokens)
    params = learned(config, base, asked, directory)
    found = {"before": answers(base, base.params, kept, config.tokens, EACH)}
    found["after"] = answers(base, params, kept, config.tokens, EACH)
    keep_samples(directory, found)
    rollouts = [record.load(path) for path in sorted((directory / "rollouts").glob("*"))]
    return {
        **compared(judges, found),
        **probe(base, rollouts, learn, judges[1]),
        "length/before": record.statistics(rollouts[0])["length"],
        "length/after": record.statistics(rollouts[-1])["length"],
        **{f"time/{k}": v for k, v in json.loads((directory / TIME).read_text()).items()},
    }


def answers(
    base: hub.Pretrained, params: Params, prompts: list[Prompt], tokens: int, each: int
) -> tuple[list[str], list[str]]:
    """(what was asked, `each` answers to every prompt), at temperature 1 and always with the same keys."""
    sampling = Sampling(max_tokens=tokens, stop_ids=base.tokenizer.stop_ids)
    asked, said = [], []
    for number in range(each):
        rng = jax.random.key(1 + number)
        ids = [ids for _, ids in prompts]
        found = generate(base.model, without_critic(params), ids, rng, sampling)
        asked += [text for text, _ in prompts]
        said += [base.tokenizer.decode(row) for row in found.rows()]
    return asked, said


def compared(judges: list[Reward], found: dict) -> dict[str, float]:
    """Mean scores by both judges, and the standard error of the difference over prompts."""
    values = {}
    for name, judge in zip(("reward", "held_out"), judges, strict=True):
        scores = {when: judge(*texts).reshape(EACH, -1).mean(0) for when, texts in found.items()}
        values |= {f"{name}/{when}": float(x.mean()) for when, x in scores.items()}
        gain = scores["after"] - scores["before"]
        values[f"{name}/error"] = float(gain.std(ddof=1) / len(gain) ** 0.5)
    return values


def probe(base, rollouts: list[Rollout], prompts: list[Prompt], judge: Reward) -> dict[str, float]:
    """Of every rollout: the reward that was optimised, what the held-out judge says, KL in nats an answer."""
    values = {}
    for number, rollout in enumerate(rollouts):
        found = record.statistics(rollout)
        held_out = float(judge(*rlhf.told(base, rollout, prompts)).mean())
        for name, value in (
            ("reward", found["score"]),
            ("held_out", held_out),
            ("kl", found["kl"]),
        ):
            values[f"probe/{number:02d}/{name}"] = value
    return values


def keep_samples(directory: Path, found: dict) -> None:
    (asked, before), (_, after) = found["before"], found["after"]
    lines = [
        {"prompt": p, "before": b, "after": a}
        for p, b, a in zip(asked[:SHOWN], before, after, strict=False)
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def settings(config: Config) -> Rollouts:
    return Rollouts(
        prompts=config.prompts,
        answers=config.answers,
        epochs=config.epochs,
        minibatches=2,
        estimator=Estimator("gae"),
        kl=config.kl,
        seed=config.seed,
    )


def learned(config: Config, base: hub.Pretrained, asked: Task, directory: Path) -> Params:
    """Step 3. Every rollout is kept in the run's directory, and where the time went."""
    clock = Clock()
    params, rule = sft.with_lora(
        base.params, sft.LINEAR, config.rank, 2.0 * config.rank, config.seed
    )
    params = with_critic(params, base.model.config.width)
    (directory / "rollouts").mkdir(parents=True, exist_ok=True)

    def keep(iteration: int, rollout: Rollout) -> None:
        record.save(rollout, directory / "rollouts" / f"{iteration:04d}.safetensors")

    made = settings(config)
    steps = config.iterations * made.steps
    source = rollout_source(base.model, asked, made, without_adapter, keep=keep, clock=clock)
    fitted = fit(
        policy_gradient(base.model, Loss(value_weight=0.5, entropy_weight=0.0)),
        source,
        params,
        AdamW(Cosine(config.lr, steps, 1, end=0.1 * config.lr), weight_decay=0.0),
        Training(steps, log_every=2, save_every=8, seed=config.seed, directory=directory),
        rule=((CRITIC, True), *rule),
        identity=config,
    )
    if clock.seconds or not (directory / TIME).exists():  # a run that was done has none
        (directory / TIME).write_text(json.dumps(clock.shares()))
    return fitted.params


def quarters(row: results.Row, name: str) -> tuple[float, float]:
    """Means over the first and the last quarter of the rollouts."""
    values = [v for k, v in sorted(row["metrics"].items()) if re.fullmatch(rf"probe/\d+/{name}", k)]
    size = max(1, len(values) // 4)
    return float(np.mean(values[:size])), float(np.mean(values[-size:]))


def table(rows: list[results.Row]) -> str:
    """Two lines a seed, and where the time went."""
    found = [row for group in cells(rows, BASE).values() for row in group.rows]
    lines = []
    for row in found:
        m = row["metrics"]
        for name, label in (("reward", "the reward"), ("held_out", "the held-out one")):
            gain = m[f"{name}/after"] - m[f"{name}/before"]
            first, last = quarters(row, name)
            shown = [f"{gain:+.2f} ± {m[f'{name}/error']:.2f}", f"{first:+.2f}", f"{last:+.2f}"]
            lines.append([row["config"]["seed"], label, *shown, f"{quarters(row, 'kl')[1]:.1f}"])
    phases = [name for name in found[0]["metrics"] if name.startswith("time/")]
    spent = ", ".join(
        f"{name.removeprefix('time/')} {np.mean([row['metrics'][name] for row in found]):.0%}"
        for name in phases
    )
    heads = ["seed", "judge", "gain on other instructions", "first quarter", "last", "KL, last"]
    return (
        markdown(heads, lines)
        + "\nIn deviations of the answers before PPO. Gain: over instructions that were not learned with, "
        + f"{EACH} answers to each, ± the standard error over instructions; quarters: of the rollouts, nats an "
        + f"answer. Shares of PPO's time: {spent}.\n"
    )


def figure(rows: list[results.Row]) -> Figure:
    """Both judges over the rollouts, means of four; a line for each seed."""
    drawing = Figure(figsize=(5, 3), layout="constrained")
    axes = drawing.subplots()
    for row in rows:
        style = ("-", "--", ":")[row["config"]["seed"] % 3]
        for name, colour in (("reward", "C0"), ("held_out", "C1")):
            keys = sorted(k for k in row["metrics"] if re.fullmatch(rf"probe/\d+/{name}", k))
            values = np.array([row["metrics"][k] for k in keys])
            size = min(4, len(values))
            smooth = np.convolve(values, np.full(size, 1 / size), "valid")
            axes.plot(np.arange(len(smooth)) + (size + 1) / 2, smooth, colour, ls=style, lw=1)
    axes.plot([], [], "C0", label="the reward")
    axes.plot([], [], "C1", label="the held-out one")
    axes.set_xlabel("rollout")
    axes.set_ylabel("deviations")
    axes.legend(frameon=False)
    return drawing


def samples(rows: list[results.Row], runs: Path) -> str:
    """What was said before and after."""
    row = rows[0]
    lines = [json.loads(x) for x in (runs / row["id"] / "samples.jsonl").read_text().splitlines()]
    lines = lines[:SAMPLES]
    said = {when: [line[when] for line in lines] for when in ("before", "after")}
    notes = {when: [""] * len(lines) for when in said}
    return side_by_side([line["prompt"] for line in lines], said, notes)


BASE = Config()
SWEEP = param("seed", 0, 1)
SMOKE = {
    "sft_steps": 3,
    "recipe": Recipe(steps=4),
    "reward_layers": 1,
    "iterations": 1,
    "prompts": 2,
    "epochs": 1,
    "tokens": 4,
    "layers": 1,
    "held_out": 4,
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
