"""How likely and how repetitive is what each way of decoding says?  Holtzman et al. 2019
(arXiv:1904.09751), Table 1, on a small model.

SmolLM2-135M-Instruct continues the beginnings of encyclopedia articles by greedy, beam and
contrastive search, and by sampling of several kinds. Measured: mean log p of a token under the model, repeated
4-grams within a text (rep-4), and different n-grams over all (distinct-n). The articles' own
continuations are measured beside them.

Differs from the paper: 135M parameters; no human judgement, no Zipf coefficient, no self-BLEU.
Run:    python -m experiments.decoding_quality --sweep        (7 ways of decoding)
Expect: greedy and beam search far more likely and far more repetitive than the
        articles, beam search the most; plain sampling less likely than the articles, with about
        their diversity; top-k, top-p and typical sampling (Meister et al. 2022) in between.
        Contrastive search (Su et al. 2022) a little less likely than greedy, much less repetitive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.shared.first_layers import smollm2_instruct
from research import hub
from research.data import corpora
from research.data.shuffle import permutation
from research.decode import Beams, Contrastive, Sampling, beam_search, contrastive_search, generate
from research.decode.generate import for_decoding
from research.evaluate.diversity import distinct, repetition
from research.evaluate.nll import continuation_log_probs
from research.runs import main, param, results
from research.types import Params

SPLIT_SEED = 0  # of the prompts: the same ones whatever the run's seed


@dataclasses.dataclass(frozen=True)
class Config:
    """`prompts` beginnings of `length` tokens, each continued by the tokens `decode` says."""

    decode: Sampling | Beams | Contrastive = Sampling(temperature=0.0, max_tokens=64)
    prompts: int = 16
    length: int = 32
    seed: int = 0


def passages(config: Config, tokenizer: Any) -> list[list[int]]:
    """Token ids of paragraphs, cut to prompt and continuation."""
    size = config.length + config.decode.max_tokens
    paragraphs = [text for text in corpora.wiki().split("\n") if len(text) > 8 * size]
    found = []
    for i in permutation(SPLIT_SEED, 0, len(paragraphs)):
        ids = tokenizer.encode(paragraphs[i])
        if len(ids) >= size:
            found.append(list(ids[:size]))
        if len(found) == config.prompts:
            return found
    raise ValueError(f"{len(found)} paragraphs have {size} tokens; {config.prompts} are asked for")


def continued(
    base: hub.Pretrained, params: Params, config: Config, prompts: Sequence[Sequence[int]]
) -> list[list[int]]:
    if isinstance(config.decode, Beams):
        return beam_search(base.model, params, prompts, config.decode).rows()
    if isinstance(config.decode, Contrastive):
        return contrastive_search(base.model, params, prompts, config.decode).rows()
    rng = jax.random.key(config.seed)
    return generate(base.model, params, prompts, rng, config.decode).rows()


def quality(
    base: hub.Pretrained, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """log_prob: nats a token, mean over all tokens."""
    whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    starts = [len(prompt) for prompt in prompts]
    rows = continuation_log_probs(base.model, base.params, whole, starts)
    found = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
    return found | {"rep_4": repetition(texts, 4), "log_prob": float(np.concatenate(rows).mean())}


def run(config: Config, directory: Path) -> dict[str, float]:
    base = smollm2_instruct()
    whole = passages(config, base.tokenizer)
    prompts = [ids[: config.length] for ids in whole]
    said = continued(base, for_decoding(base.params), config, prompts)
    article = quality(base, prompts, [ids[config.length :] for ids in whole])
    found = quality(base, prompts, said)
    return found | {f"article/{name}": value for name, value in article.items()}


def name_of(decode: dict) -> str:
    """Of a way of decoding, as its row's config has it."""
    if "beams" in decode:
        return f"beam {decode['beams']}"
    if "alpha" in decode:
        return f"contrastive {decode['alpha']}, {decode['top_k']} candidates"
    named = ("top_k", "top_p", "typical_p")
    filters = [f"{name} {decode[name]}" for name in named if decode[name] is not None]
    temperature = f"temperature {decode['temperature']}" if decode["temperature"] else "greedy"
    return ", ".join(filters) or temperature


def table(rows: list[results.Row]) -> str:
    names = ("log_prob", "rep_4", "distinct_1", "distinct_2", "distinct_3")
    lines = [f"| decoding | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    found = [(name_of(row["config"]["decode"]), results.metrics(row), "") for row in rows]
    found.append(("the articles", results.metrics(rows[-1]), "article/"))
    for title, metrics, prefix in found:
        lines.append(f"| {title} | {' | '.join(f'{metrics[prefix + n]:.3f}' for n in names)} |")
    return "\n".join(lines) + "\n"


BASE = Config()
SWEEP = param(
    "decode",
    Sampling(temperature=0.0, max_tokens=64),
    Beams(4, max_tokens=64),
    Contrastive(4, 0.6, max_tokens=64),
    Sampling(temperature=1.0, max_tokens=64),
    Sampling(top_k=40, max_tokens=64),
    Sampling(top_p=0.95, max_tokens=64),
    Sampling(typical_p=0.95, max_tokens=64),
)
SMOKE = {"decode": Beams(2, max_tokens=8), "prompts": 2, "length": 8}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
