"""Which checkpoints are there, which is the best, and which may go."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Best:
    """Which evaluation metric to keep the best checkpoint of: keep_best=Best("accuracy", "highest")."""

    metric: str
    prefer: Literal["lowest", "highest"] = "lowest"

    def of(self, evaluation: dict[str, float] | None) -> float | None:
        """The metric turned so that lower is better; None where it was not evaluated."""
        if evaluation is None:
            return None
        if self.metric not in evaluation:
            raise KeyError(f"keep_best names {self.metric!r}; evaluate gave {sorted(evaluation)}")
        value = float(evaluation[self.metric])
        return value if self.prefer == "lowest" else -value


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    return sorted(int(path.name[5:]) for path in directory.glob("step_" + "[0-9]" * 8))


def prune(directory: Path, keep: int, best: Best | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    found = steps(directory)
    kept = set(found[-keep:])
    if best is not None and (scored := _scores(directory, found, best)):
        kept.add(min(scored)[1])
    for step in set(found) - kept:
        discard(directory / f"step_{step:08d}")


def best_score(directory: Path, best: Best) -> float:
    """The best evaluation among the checkpoints, lower is better; infinite when there is none."""
    return min(_scores(directory, steps(directory), best), default=(float("inf"), 0))[0]


def sweep(directory: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in directory.glob(".step_*"):
        shutil.rmtree(path)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that no part of it is ever seen under its final name."""
    if checkpoint.exists():
        condemned = checkpoint.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(condemned, ignore_errors=True)
        checkpoint.rename(condemned)
        shutil.rmtree(condemned)


def _scores(directory: Path, found: list[int], best: Best) -> list[tuple[float, int]]:
    scored = []
    for step in found:
        try:
            meta = json.loads((directory / f"step_{step:08d}" / "meta.json").read_text())
        except (OSError, ValueError):
            continue  # damaged since it was written: it cannot be the best
        score = best.of(meta.get("evaluation"))
        if score is not None and score == score:
            scored.append((score, step))
    return scored
