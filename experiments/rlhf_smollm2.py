"""Supervised fine-tuning, a reward model, PPO: InstructGPT's three steps on a real model (Ouyang et al. 2022,
arXiv:2203.02155; Ziegler et al. 2019, arXiv:1909.08593).

1. SmolLM2-135M-Instruct is tuned a little on the chosen answers of real English pairs, with LoRA, merged then.
2. Two reward models, first 8 layers each, learn from halves of the pairs that share no prompt: one is the reward,
   the other one judges in the end and is never optimised.
3. PPO with another LoRA: the policy answers short instructions of Alpaca, `prompts` × `answers` an iteration, at
   most `tokens` tokens. A critic on the policy's states, GAE, a KL penalty to the model of step 1, which is the policy
   without its adapter. Rewards are in deviations of the answers before PPO.

Measured on other instructions, before and after: both rewards, and what is said. KL and length are those of the last
rollout, drawn while learning. Where the time goes: `time/`, shares of PPO's iterations.

Differs from the paper: 135M parameters, 150 pairs a reward model, answers of `tokens` tokens, a few hundred
answers in all, LoRA in every step, no pretraining mix (the objective has it).
Run:    .venv/bin/python -m experiments.rlhf_smollm2 --sweep
Expect: the reward up by half a deviation and more at a KL of a few nats, the held-out one by less.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.shared import reward_training, sft
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_instruct, smollm2_layers
from experiments.shared.reward_training import Recipe
from experiments.shared.samples import side_by_side
from research import hub
from research.data import corpora, preferences, shuffle
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
from research.rl.text import text_task
from research.runs import main, param, results
from research.tokenize import chat
from research.train.loop import Training, fit
from research.train.optim import AdamW
from research.train.schedules import Cosine
from research.types import Params
from research.weights.base import merge

SAMPLES = 4


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


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Of step 1; `seed` and `steps` are the run's."""

    steps: int
    seed: int
    lr: float = 2e-4
    warmup_steps: int = 2
    batch_size: int = 4


def encode(messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    return chat.encode_chat(smollm2_instruct().tokenizer, messages)


@cache
def halves() -> tuple[list, list]:
    """The pairs, in two parts that share no prompt."""
    rows = [(place, preferences.preference(row, place)) for place, row in corpora.preferences_en()]
    return sft.split(rows, len(rows) // 2, key=lambda row: str(row[1].prompt))


@cache
def instructions(held_out: int) -> tuple[list, list]:
    """(to learn with, held out): short instructions of Alpaca as (text, ids)."""
    tokenizer = smollm2_instruct().tokenizer
    rows = [row["instruction"] for _, row in corpora.alpaca_en() if not row["input"]]
    short = list(dict.fromkeys(text for text in rows if len(text) < 80))
    short = [short[i] for i in shuffle.permutation(0, 0, len(short))]
    asked = [[{"role": "user", "content": text}] for text in short]
    ids = [tokenizer.encode(chat.render(tokenizer, turn, True)) for turn in asked]
    found = list(zip(short, ids, strict=True))
    return found[held_out:], found[:held_out]


def tuned(config: Config, directory: Path) -> hub.Pretrained:
    """Step 1, on both halves' chosen answers."""
    base = smollm2_layers(config.layers)
    if not config.sft_steps:
        return base
    rows = [
        (place, [*pair.prompt, {"role": "assistant", "content": pair.chosen}])
        for place, pair in (*halves()[0], *halves()[1])
    ]
    params, rule = sft.with_lora(base.params, sft.LINEAR, config.rank, 2.0 * config.rank, 0)
    table = sft.packed(rows, encode, 256)
    done = sft.tune(base, params, rule, table, Tuning(config.sft_steps, 0), directory / "sft")
    return dataclasses.replace(done, params=merge(done.params))


@cache
def judges(recipe: Recipe, layers: int) -> tuple[Reward, Reward]:
    """Step 2: (the reward, the one that is never optimised)."""
    base, cut = smollm2_layers(layers), reward_training.recent(encode, 64)
    made = []
    for seed, half in enumerate(halves()):
        table = reward_training.rows(half, cut, 192)
        params = reward_training.trained(base, table, recipe, seed, None)
        made.append(reward_training.as_reward(base, params, cut, 192))
    return made[0], made[1]


def run(config: Config, directory: Path) -> dict[str, float]:
    base = tuned(config, directory)
    both = judges(config.recipe, config.reward_layers)
    learn, kept = instructions(config.held_out)
    texts = [text for text, _ in kept]
    before = answers(base, base.params, kept, config)
    scales = [(float(x.mean()), float(x.std()) + 1e-6) for x in (r(texts, before) for r in both)]
    proxy, gold = (normalised(r, *scale) for r, scale in zip(both, scales, strict=True))
    clock = Clock()
    params = learned(config, base, task(base, learn, proxy, config), clock, directory)
    after = answers(base, params, kept, config)
    lines = [
        {"prompt": p, "before": b, "after": a} for p, b, a in zip(texts, before, after, strict=True)
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, last = (record.load(path) for path in ends(directory))
    return {
        **compared("reward", proxy, texts, before, after),
        **compared("held_out", gold, texts, before, after),
        "learning/first": float(first.scores.mean()),
        "learning/last": float(last.scores.mean()),
        "kl": record.statistics(last)["kl"],
        "length/before": record.statistics(first)["length"],
        "length/after": record.statistics(last)["length"],
        **{f"time/{phase}": share for phase, share in clock.shares().items()},
    }


def compared(name: str, reward: Reward, prompts: list, before: list, after: list) -> dict:
    values = [float(reward(prompts, said).mean()) for said in (before, after)]
    return {f"{name}/before": values[0], f"{name}/after": values[1]}


def task(base: hub.Pretrained, prompts: list, reward: Reward, config: Config):
    tokenizer, size = base.tokenizer, base.model.config.vocab_size
    return text_task(size, prompts, tokenizer.decode, reward, config.tokens, tokenizer.stop_ids)


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


def learned(config: Config, base: hub.Pretrained, asked, clock: Clock, directory: Path) -> Params:
    """Step 3. Every rollout is kept in the run's directory."""
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
    return fit(
        policy_gradient(base.model, Loss(value_weight=0.5, entropy_weight=0.0)),
        source,
        params,
        AdamW(Cosine(config.lr, steps, 1, end=0.1 * config.lr), weight_decay=0.0),
        Training(steps, log_every=2, save_every=8, seed=config.seed, directory=directory),
        rule=((CRITIC, True), *rule),
        identity=config,
    ).params


def ends(directory: Path) -> tuple[Path, Path]:
    found = sorted((directory / "rollouts").glob("*.safetensors"))
    return found[0], found[-1]


def answers(base: hub.Pretrained, params: Params, prompts: list, config: Config) -> list[str]:
    """One answer to each, at temperature 1, always with the same keys."""
    sampling = Sampling(max_tokens=config.tokens, stop_ids=base.tokenizer.stop_ids)
    ids = [ids for _, ids in prompts]
    said = generate(base.model, without_critic(params), ids, jax.random.key(1), sampling)
    return [base.tokenizer.decode(row) for row in said.rows()]


COLUMNS = {
    "reward": "reward/after",
    "held-out reward": "held_out/after",
    "KL of the last rollout": "kl",
    "reward in training, first": "learning/first",
    "last": "learning/last",
    "tokens, first": "length/before",
    "tokens, last": "length/after",
}


def table(rows: list[results.Row]) -> str:
    """A line a seed, and where the time went."""
    found = [row for group in cells(rows, BASE).values() for row in group.rows]
    lines = [
        [str(row["config"]["seed"]), *(f"{row['metrics'][key]:.2f}" for key in COLUMNS.values())]
        for row in found
    ]
    phases = [name for name in found[0]["metrics"] if name.startswith("time/")]
    spent = ", ".join(
        f"{name.removeprefix('time/')} {np.mean([row['metrics'][name] for row in found]):.0%}"
        for name in phases
    )
    return (
        markdown(["seed", *COLUMNS], lines)
        + "\nRewards are in deviations of the answers before PPO, whose mean is 0, on instructions that were "
        + f"not learned with; one answer each. Shares of PPO's time: {spent}.\n"
    )


def figure(rows: list[results.Row]) -> Figure:
    """Both rewards before and after."""
    drawing = Figure(figsize=(4.5, 3), layout="constrained")
    axes = drawing.subplots()
    for row in rows:
        for name, colour in (("reward", "C0"), ("held_out", "C1")):
            values = [row["metrics"][f"{name}/{when}"] for when in ("before", "after")]
            axes.plot(["before", "after"], values, f"{colour}o-")
    axes.plot([], [], "C0", label="the reward")
    axes.plot([], [], "C1", label="the held-out one")
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
