"""What becomes of the true reward when a learned one is optimised?  Gao et al. 2023 (arXiv:2210.10760), Fig. 1a.

As in the paper the true reward is itself a model, the gold one: the first 8 layers of SmolLM2-135M-Instruct,
trained on all 300 real English pairs. Proxies are its first 4 layers, trained on 16, 64 or 256 pairs of
SmolLM2's own answers that the gold model labelled without noise. For 16 other short instructions of Alpaca 32
answers are sampled once; best-of-n picks by a proxy, and proxy and gold reward of what is picked are estimated
without bias for n = 1 ... 32 against KL = log n − (n − 1)/n. One row more picks by three proxies that differ
in their seed, mean − variance between them (Coste et al. 2023, arXiv:2310.02743).

Differs from the paper: best-of-n alone and n to 32 instead of 60,000, which is 2.5 nats of KL instead of 10; answers
of 40 tokens; a gold model of 300 pairs, whose agreement with people matters to nothing measured here. Rewards
are less the mean of their prompt, in deviations within prompts, so that n = 1 is 0.
Run:    .venv/bin/python -m experiments.overoptimization --sweep
Expect: proxy reward twice the gold one and above what picking by gold itself would give; gold reward that rises with
        n and, hardly beyond the error, with pairs, and rises no more at n = 32 with 16 of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.shared import reward_training
from experiments.shared.cells import cells, markdown
from experiments.shared.first_layers import smollm2_instruct, smollm2_layers
from experiments.shared.reward_training import Recipe
from experiments.shared.rlhf import short_instructions
from research.data import corpora, preferences, rankings, shuffle
from research.data.preferences import Preference
from research.data.rankings import Scored
from research.data.supervised import Encode
from research.decode.generate import for_decoding, generate
from research.decode.sampling import Sampling
from research.evaluate import best_of_n
from research.evaluate.ranking import kendall_tau
from research.rewards import How, Reward, checked, ensemble, normalised
from research.runs import chain, main, param, product, results
from research.tokenize import chat

PAIRS = {"16": 16, "64": 64, "256": 256}
MEMBERS = {"one": 1, "three": 3}
NUMBERS = (1, 2, 4, 8, 16, 32)
ROWS = 32  # sampled at once
PROMPT = 64  # tokens of a prompt that reward models see


@dataclasses.dataclass(frozen=True)
class Gold:
    """The gold model, and what is asked of the policy: the same in all runs of a sweep."""

    recipe: Recipe = Recipe(steps=75)
    layers: int = 8
    length: int = 192
    prompts: int = 16
    answers: int = 32
    labelled_prompts: int = 64
    labelled_answers: int = 4
    tokens: int = 40


@dataclasses.dataclass(frozen=True)
class Config:
    """A proxy of `layers`, trained on `pairs`; `members` of them are put together by `how`."""

    pairs: int = 64
    members: int = 1
    how: How = "uncertainty-penalised"
    recipe: Recipe = Recipe()
    layers: int = 4
    gold: Gold = Gold()
    seed: int = 0


def encoder() -> Encode:
    return reward_training.recent(partial(chat.encode_chat, smollm2_instruct().tokenizer), PROMPT)


def sampled(prompts: Sequence[str], answers: int, tokens: int) -> np.ndarray:
    """What SmolLM2-Instruct says at temperature 1, texts [prompts, answers]."""
    base = smollm2_instruct()
    tokenizer, params = base.tokenizer, for_decoding(base.params)
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [tokenizer.encode(chat.render(tokenizer, turn, True)) for turn in turns]
    repeated = [each for each in ids for _ in range(answers)]
    keys = jax.random.split(jax.random.key(0), len(repeated))
    sampling = Sampling(max_tokens=tokens, stop_ids=tokenizer.stop_ids)
    texts = []
    for first in range(0, len(repeated), ROWS):
        part = slice(first, first + ROWS)
        said = generate(base.model, params, repeated[part], keys[part], sampling)
        texts += [tokenizer.decode(row) for row in said.rows()]
    return np.array(texts, dtype=object).reshape(len(prompts), answers)


@cache
def gold_reward(gold: Gold) -> Reward:
    """The gold model, trained on all real pairs."""
    base = smollm2_layers(gold.layers)
    rows = [(place, preferences.preference(row, place)) for place, row in corpora.preferences_en()]
    table = reward_training.rows(rows, encoder(), gold.length)
    params = reward_training.trained(base, table, gold.recipe, 0, None)
    return reward_training.as_reward(base, params, encoder(), gold.length)


def scored(reward: Reward, prompts: Sequence[str], texts: np.ndarray) -> np.ndarray:
    """Scores of texts [prompts, answers]."""
    repeated = [prompt for prompt in prompts for _ in range(texts.shape[1])]
    return reward(repeated, texts.ravel().tolist()).reshape(texts.shape)


@cache
def judged(gold: Gold) -> tuple[list[str], np.ndarray, np.ndarray, list[tuple[str, Preference]]]:
    """Prompts, their answers and the answers' gold scores [prompts, answers]; and pairs of answers to other
    prompts, labelled."""
    prompts = short_instructions()[: gold.prompts + gold.labelled_prompts]
    own, others = prompts[: gold.prompts], prompts[gold.prompts :]
    texts, told = (
        sampled(own, gold.answers, gold.tokens),
        sampled(others, gold.labelled_answers, gold.tokens),
    )
    reward = gold_reward(gold)
    scores = scored(reward, others, told)
    rows = [
        (f"{p}, answer {a}", Scored([{"role": "user", "content": others[p]}], told[p, a], float(s)))
        for (p, a), s in np.ndenumerate(scores)
    ]
    pairs = rankings.scored_pairs(rows, 1e-6)
    print(f"  {rankings.statistics([pair for _, pair in pairs])}", flush=True)
    return own, texts, scored(reward, own, texts), pairs


def proxy_reward(config: Config, directory: Path) -> Reward:
    """One reward model on the labelled pairs that the seed chooses, or several that saw the same ones."""
    own, texts, _, pairs = judged(config.gold)
    chosen = shuffle.permutation(config.seed, 0, len(pairs))[: config.pairs]
    base, length = smollm2_layers(config.layers), PROMPT + config.gold.tokens + 8
    table = reward_training.rows([pairs[i] for i in chosen], encoder(), length)
    members = []
    for member in range(config.members):
        seed = 100 * config.seed + member
        params = reward_training.trained(
            base, table, config.recipe, seed, directory / f"member_{member}"
        )
        members.append(reward_training.as_reward(base, params, encoder(), length))
    if config.members == 1:
        return members[0]
    scales = [scored(each, own, texts) for each in members]
    alike = [normalised(r, s.mean(), s.std()) for r, s in zip(members, scales, strict=True)]
    return checked(ensemble(alike, config.how))


def centred(scores: np.ndarray) -> np.ndarray:
    """Scores [prompts, answers] less their prompt's mean, in deviations within prompts."""
    less = scores - scores.mean(-1, keepdims=True)
    return less / np.sqrt(np.square(less).mean())


def run(config: Config, directory: Path) -> dict[str, float]:
    own, texts, gold, _ = judged(config.gold)
    proxy, gold = centred(scored(proxy_reward(config, directory), own, texts)), centred(gold)
    found = {}
    for n in [n for n in NUMBERS if n <= config.gold.answers]:
        picked = best_of_n.expected(proxy, gold, n)
        found |= {
            f"kl/{n}": best_of_n.kl(n),
            f"proxy/{n}": float(best_of_n.expected(proxy, proxy, n).mean()),
            f"gold/{n}": float(picked.mean()),
            f"error/{n}": float(picked.std(ddof=1) / np.sqrt(len(picked))),
            f"best/{n}": float(best_of_n.expected(gold, gold, n).mean()),
        }
    tau = np.nanmean([kendall_tau(*both) for both in zip(proxy, gold, strict=True)])
    return found | {"agreement": float((tau + 1) / 2)}


def found_cells(rows: list[results.Row]) -> dict[tuple[str, ...], results.Group]:
    return cells(rows, BASE, pairs=PAIRS, members=MEMBERS)


def table(rows: list[results.Row]) -> str:
    """A line for each number of pairs and of members; means over seeds."""
    lines, found = [], found_cells(rows)
    for (pairs, members), group in found.items():
        mean = lambda key, group=group: group.statistic(key).mean  # noqa: E731
        gold = [f"{mean(f'gold/{n}'):.2f}" for n in NUMBERS[1:]]
        last = f"{mean('proxy/32'):.2f}", f"{mean('error/32'):.2f}", f"{mean('agreement'):.3f}"
        lines.append([pairs, members, *gold, *last])
    heads = ["pairs", "proxies", *(f"gold, n = {n}" for n in NUMBERS[1:])]
    first = next(iter(found.values()))
    best = ", ".join(f"{first.statistic(f'best/{n}').mean:.2f}" for n in NUMBERS[1:])
    return markdown(
        [*heads, "proxy, n = 32", "error over prompts", "pairs ordered as gold"], lines
    ) + (f"\nDeviations within prompts; picking by the gold reward itself gives {best}.\n")


def figure(rows: list[results.Row]) -> Figure:
    """Gold reward (lines) and proxy reward (dashes) of what is picked, against KL."""
    found = found_cells(rows)
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    for index, ((pairs, members), group) in enumerate(found.items()):
        mean = lambda key, group=group: [group.statistic(f"{key}/{n}").mean for n in NUMBERS]  # noqa: E731
        label = f"{pairs} pairs" + ("" if members == "one" else f", {members} proxies")
        axes.plot(mean("kl"), mean("gold"), f"C{index}o-", markersize=3, label=label)
        if members == "one":  # several are no reward of unit deviation
            axes.plot(mean("kl"), mean("proxy"), f"C{index}--", linewidth=1)
    axes.plot(mean("kl"), mean("best"), "0.5", linewidth=1, label="picked by gold")
    axes.set_xlabel("KL from the policy, nats")
    axes.set_ylabel("gold reward (dashed: proxy)")
    axes.legend(frameon=False, fontsize="small")
    return drawing


BASE = Config()
SWEEP = chain(
    product(param("pairs", *PAIRS.values()), param("seed", 0, 1)),
    product(param("members", 3), param("seed", 0, 1)),
)
SMOKE = {
    "pairs": 4,
    "recipe": Recipe(steps=2, warmup_steps=1, batch_size=2, rank=2),
    "layers": 1,
    "gold": Gold(Recipe(steps=2, warmup_steps=1, batch_size=2, rank=2), 1, 128, 2, 2, 3, 2, 4),
}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
