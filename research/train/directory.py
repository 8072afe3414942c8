"""The directory of a run: whose it is, its checkpoints, its metrics.

DIRECTORY/identity.json    what decides the course of the run; another run is refused
DIRECTORY/metrics.jsonl    see metrics.py
DIRECTORY/checkpoints/     see checkpoint.py
DIRECTORY/.lock            held by the process that runs in it, see lock.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.paths import named_leaves
from research.train import checkpoint, retention
from research.train.checkpoint import CheckpointError
from research.train.lock import Lock
from research.train.metrics import MetricsLog, Row
from research.train.retention import Best
from research.train.state import TrainState
from research.train.stopping import Waiting
from research.types import Mean, PyTree


class OtherRunError(ValueError):
    """The directory belongs to a run with another config."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: its state, the metrics of the last step, the evaluation at this step, and
    how long it has waited for a better one."""

    state: TrainState
    step: int = 0
    last_metrics: dict[str, Mean] = field(default_factory=dict)
    evaluation: dict[str, float] | None = None
    waiting: Waiting = Waiting()


class RunDirectory:
    """Checkpoints and metrics of one run on disk."""

    def __init__(self, path: Path, identity: Mapping[str, Any], keep: int, keep_best: Best | None):
        """Raises OtherRunError when the directory belongs to a run with another `identity`,
        InUseError when another process is running in it."""
        self._lock = Lock(path)
        try:
            claim(path, identity)
        except BaseException:
            self._lock.release()
            raise
        self._path, self._best = path, keep_best
        self._checkpoints = path / "checkpoints"
        self._saver = checkpoint.BackgroundSaver(self._checkpoints, keep, keep_best)
        self._log: MetricsLog | None = None
        self._saved_at = -1

    def resume(self, state: TrainState) -> Progress:
        """The newest sound checkpoint as a tree like `state`, or `state` itself at step 0."""
        retention.sweep(self._checkpoints)
        restored = checkpoint.restore_newest(self._checkpoints, state)
        progress = Progress(state) if restored is None else _progress(restored)
        if restored is not None:
            print(f"resumed from step {progress.step} in {self._path}", flush=True)
            self._saved_at = progress.step
        self._log = MetricsLog(self._path / "metrics.jsonl", progress.step)
        return progress

    def write(self, row: Row) -> None:
        self._log.write(row)

    def save(self, progress: Progress) -> None:
        """Start to save, unless this step is saved already. Raises the error of an earlier save."""
        if self._saved_at != progress.step:
            last = {
                name: [float(mean.total), float(mean.count)]
                for name, mean in progress.last_metrics.items()
            }
            meta = {"evaluation": progress.evaluation, "last_metrics": last}
            meta["waiting"] = asdict(progress.waiting)
            self._saver.save(progress.step, progress.state, meta)
            self._saved_at = progress.step

    def is_best(self, evaluation: Mapping[str, float]) -> bool:
        """Whether `evaluation` is better than that of every checkpoint there is."""
        if self._best is None:
            return False
        self._saver.wait()
        score = self._best.of(evaluation)
        return score < retention.best_score(self._checkpoints, self._best)

    def check(self) -> None:
        """Raise the error of a save that has failed in the background."""
        self._saver.check()

    def finish(self) -> str:
        """Wait for the last save; where it is, for a person."""
        self._saver.wait()
        return f"saved in {self._path}"

    def close(self) -> None:
        """Wait for the last save and let others in. Raises the error of that save."""
        if self._log is not None:
            self._log.close()
        try:
            self._saver.wait()
        finally:
            self._lock.release()


class Nowhere:
    """A run that keeps nothing: the same operations as RunDirectory, none of which writes."""

    def resume(self, state: TrainState) -> Progress:
        return Progress(state)

    def write(self, row: Row) -> None: ...

    def save(self, progress: Progress) -> None: ...

    def is_best(self, evaluation: Mapping[str, float]) -> bool:
        return False

    def check(self) -> None: ...

    def finish(self) -> str:
        return "nothing is saved: the run has no directory"

    def close(self) -> None: ...


def claim(directory: Path, identity: Mapping[str, Any]) -> None:
    """Write `identity` (plain JSON values) to identity.json, or compare it with the one that is there.

    While there is no checkpoint there is no run to protect: a first step that failed must not keep
    out the corrected config, so the identity is written anew and the metrics start afresh.

    Raises OtherRunError naming the fields that differ, CheckpointError when the file is unreadable.
    """
    path = directory / "identity.json"
    wanted = json.loads(json.dumps(identity, sort_keys=True))
    if path.exists() and _has_checkpoints(directory / "checkpoints"):
        _require_equal(directory, _read(path), wanted)
        return
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").unlink(missing_ok=True)
    partial = path.with_name(".identity.json.partial")
    partial.write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def shapes(params: PyTree) -> dict[str, str]:
    """{path: 'float32[2, 3]'}: what a resumed run must find again."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named_leaves(params)}


def digests(params: PyTree) -> dict[str, str]:
    """{path: 'float32[2, 3] 64 bits of the sha256 of its bytes'}: `shapes`, and the same values."""
    return {
        name: f"{shape} {_sha256(leaf)[:16]}"
        for (name, leaf), shape in zip(named_leaves(params), shapes(params).values(), strict=True)
    }


def _sha256(leaf: Any) -> str:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    flat = np.ascontiguousarray(leaf).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8)).hexdigest()  # bfloat16 has no buffer of its own


def _has_checkpoints(directory: Path) -> bool:
    """Whether any was ever finished here; one that was put aside as damaged counts."""
    return bool(retention.steps(directory)) or any(directory.glob("damaged_step_*"))


def _progress(restored: checkpoint.Restored) -> Progress:
    last = {
        name: Mean(jnp.float32(total), jnp.float32(count))
        for name, (total, count) in restored.meta["last_metrics"].items()
    }
    waiting = Waiting(**restored.meta.get("waiting", {}))
    return Progress(restored.tree, restored.step, last, restored.meta["evaluation"], waiting)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def _require_equal(directory: Path, stored: Any, wanted: Any) -> None:
    before, now = _flat(stored), _flat(wanted)
    differing = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if differing:
        shown = "; ".join(
            f"{name}: {before.get(name, 'absent')} there, {now.get(name, 'absent')} now"
            for name in differing[:8]
        )
        raise OtherRunError(
            f"{directory} holds a run with another config ({shown}). "
            "Choose another directory, or remove this one to start again"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            path: leaf
            for key, inner in value.items()
            for path, leaf in _flat(inner, f"{name}.{key}" if name else key).items()
        }
    return {name: json.dumps(value)}
