"""The first thing to run: a real model, fetched, fine-tuned, measured before and after, talked to.

    bash scripts/quickstart.sh [--set field=value ...] [--force] [--list] [--smoke]

This is `experiments/sft_smollm2.py` at a size that a laptop finishes in some minutes. Everything it
leaves is under runs/quickstart/; started again after an interruption, it goes on from its last
checkpoint.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import sft_smollm2
from research.runs import Places, main
from research.runs.environment import ROOT

QUICK = dataclasses.replace(
    sft_smollm2.BASE,
    steps=36,
    held_out=40,
    questions=40,
    answers=4,
    answer_tokens=64,
    eval_every=None,
    save_every=6,
)


def quickstart(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and say where everything is. --smoke leaves all under runs/smoke/."""
    arguments = sys.argv[1:] if arguments is None else arguments
    runs = ROOT / "runs/quickstart"
    places = Places(runs / "rows.jsonl", runs)
    rows = main(
        QUICK,
        [],
        sft_smollm2.run,
        smoke=sft_smollm2.SMOKE,
        arguments=arguments,
        root=ROOT,
        places=places,
    )
    runs = ROOT / "runs/smoke" if "--smoke" in arguments else runs
    for row in rows:
        print(summary(row["metrics"], (runs / row["id"]).relative_to(ROOT)))


def summary(metrics: dict[str, float], directory: Path) -> str:
    """What changed, where it is, and what to do next."""
    before, after = metrics["before/nll"], metrics["after/nll"]
    kept = "adapter" if (ROOT / directory / "adapter").exists() else "model"
    talk = f"--adapter {directory}/adapter" if kept == "adapter" else f"{directory}/model"
    return f"""
Held-out loss of the answers: {before:.4f} before, {after:.4f} after (nats a token).

  report   {directory}/report.html        (open it in a browser)
  {kept:8} {directory}/{kept}
  talk     .venv/bin/python -m scripts.chat {talk}
"""


if __name__ == "__main__":
    quickstart()
