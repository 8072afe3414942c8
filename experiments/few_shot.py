"""Do solved examples help a small model to answer?  Brown et al. 2020 (arXiv:2005.14165), Fig. 1.2.

SmolLM2-135M-Instruct answers questions about qualitative relations (QuaRTz, two options) after
zero, one or four solved ones. Its options are scored as they are, by the byte, and with what the
prompt favours anyway taken out: PMI (Holtzman et al. 2021) and contextual calibration (Zhao et al.
2021), see research/evaluate/prompting.py. Chance is about one half.

Differs from the papers: 135M parameters and 4-bit weights made dense; an instruction-tuned model
without its chat template; the examples are the same for all questions of a run.
Run:    python -m experiments.few_shot --sweep      (0, 1, 4 shots; the last two with 2 seeds)
Expect: no gain from examples, near chance throughout, and a spread over the choice of examples larger
        than any difference between counts: what Brown et al. say of the smallest models. Neither
        PMI nor calibration helps here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.shared.first_layers import smollm2_instruct
from research.data import corpora
from research.evaluate import prompting
from research.evaluate.prompting import Template
from research.runs import chain, main, param, product, results

SPLIT_SEED = 0  # of the questions that are asked: the same ones whatever the run's seed
SCORES = ("raw", "per_byte", "pmi", "calibrated")


@dataclasses.dataclass(frozen=True)
class Config:
    """`questions` are asked after `shots` solved ones, which the seed chooses."""

    exam: str = "quartz"
    template: Template = Template()
    shots: int = 0
    questions: int = 80
    content_free: tuple[str, ...] = ("N/A",)
    seed: int = 0


def run(config: Config, directory: Path) -> dict[str, float]:
    base = smollm2_instruct()
    pool, asked = prompting.split(
        corpora.multiple_choice(config.exam), config.questions, SPLIT_SEED
    )
    examples = prompting.shots(pool, config.shots, config.seed)
    encode = base.tokenizer.encode
    found = prompting.examine(
        base.model, base.params, encode, config.template, asked, examples, config.content_free
    )
    low, high = found["raw"].interval
    return {name: p.value for name, p in found.items()} | {"raw_low": low, "raw_high": high}


def table(rows: list[results.Row]) -> str:
    """A line for each number of examples, a column for each score."""
    lines = [f"| shots | {' | '.join(SCORES)} |", "| --- " * (1 + len(SCORES)) + "|"]
    groups = sorted(results.groups(rows), key=lambda group: group.rows[0]["config"]["shots"])
    for group in groups:
        cells = [str(group.statistic(name)) for name in SCORES]
        lines.append(f"| {group.rows[0]['config']['shots']} | {' | '.join(cells)} |")
    lines.append("\nAccuracy, mean ± standard deviation over the choice of examples.")
    return "\n".join(lines) + "\n"


BASE = Config()
SWEEP = chain([{}], product(param("shots", 1, 4), param("seed", 0, 1)))
SMOKE = {"shots": 1, "questions": 2}

if __name__ == "__main__":
    main(BASE, SWEEP, run, table, smoke=SMOKE)
