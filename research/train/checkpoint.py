"""Checkpoints: one directory a step, written whole or not at all, checked before use.

    checkpoints/step_00000200/state/         orbax: one array for each leaf, by its path
    checkpoints/step_00000200/meta.json      step, shapes, evaluation, last metrics
    checkpoints/step_00000200/manifest.json  sha256 of every file

A checkpoint is written under a name that starts with a dot and then renamed. The tree is copied to
the host before `BackgroundSaver.save` returns, because the next step donates it; orbax, the hashes
and the rename follow in a thread. (Orbax's own asynchronous save would finish after the manifest
has to be written.) One process writes: several hosts would each need their own shards.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from research.paths import named_leaves
from research.train import manifest
from research.train.retention import Best, discard, prune, steps
from research.types import PyTree

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXT = ("no space left", "file too large", "disk quota exceeded")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be restored."""


@dataclass(frozen=True)
class Restored:
    step: int
    tree: PyTree
    meta: dict[str, Any]


def save(directory: Path, step: int, tree: PyTree, meta: dict[str, Any] | None = None) -> Path:
    """Write `tree` (arrays, keys, numbers; holes allowed) as `directory/step_XXXXXXXX`.

    Raises CheckpointError, with the partial files removed and every earlier checkpoint untouched,
    when the disk is full or the write fails otherwise.
    """
    return _commit(directory, step, _host_arrays(tree), meta or {})


def restore(checkpoint: Path, target: PyTree) -> Restored:
    """The checkpoint as a tree of the structure, types and shardings of `target`.

    Raises DamagedError when a file differs from the manifest, CheckpointError when the checkpoint
    is sound but holds other leaves or shapes than `target`.
    """
    manifest.check(checkpoint)
    meta = json.loads((checkpoint / "meta.json").read_text())
    _require_same(checkpoint, meta["leaves"], _described(_host_form(target)))
    stored = {name: _abstract(leaf) for name, leaf in _host_form(target).items() if _size(leaf)}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        arrays = reader.restore(
            checkpoint.absolute() / "state", args=ocp.args.StandardRestore(stored)
        )
    leaves = [_revive(arrays.get(_key(name)), leaf) for name, leaf in named_leaves(target)]
    return Restored(meta["step"], jax.tree.unflatten(jax.tree.structure(target), leaves), meta)


def restore_newest(
    directory: Path, target: PyTree, report: Callable[[str], None] = print
) -> Restored | None:
    """The newest checkpoint that is sound; None when there is none at all.

    A damaged one is reported, put aside as `damaged_step_XXXXXXXX`, and the one before is tried.
    CheckpointError when all are damaged: starting again from step 0 is not ours to decide.
    """
    for step in reversed(steps(directory)):
        checkpoint = directory / f"step_{step:08d}"
        try:
            return restore(checkpoint, target)
        except manifest.DamagedError as error:
            report(f"checkpoint {checkpoint} is damaged ({error}); trying the one before")
            _put_aside(checkpoint)
    if aside := sorted(path.name for path in directory.glob("damaged_step_*")):
        raise CheckpointError(
            f"no sound checkpoint is left in {directory}, only {', '.join(aside)}; "
            "remove the directory to start from step 0"
        )
    return None


class BackgroundSaver:
    """Saves one checkpoint at a time in a thread; `wait` raises what went wrong."""

    def __init__(self, directory: Path, keep: int, best: Best | None = None):
        self._directory, self._keep, self._best = directory, keep, best
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, tree: PyTree, meta: dict[str, Any]) -> None:
        """Copy `tree` to the host and start writing; waits for a save that is still under way."""
        self.wait()
        arguments = (step, _host_arrays(tree), meta)
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"save-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written. Raises CheckpointError if the last save failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a save that has failed; returns at once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        try:
            _commit(self._directory, step, arrays, meta)
            prune(self._directory, self._keep, self._best)
        except Exception as error:
            self._error = error


def _commit(
    directory: Path, step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any]
) -> Path:
    final = directory / f"step_{step:08d}"
    partial = directory / f".{final.name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _write(partial, arrays, {**meta, "step": step})
        discard(final)  # the same step again, after a restore from an earlier one
        partial.rename(final)
        _sync(directory)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = "the disk is full" if _is_full(error) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"step {step} could not be saved in {directory}: {reason}. "
            "Nothing partial is left; earlier checkpoints are intact"
        ) from error
    return final


def _write(directory: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    directory.mkdir()
    stored = {name: array for name, array in arrays.items() if _size(array)}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(directory.absolute() / "state", args=ocp.args.StandardSave(stored))
    text = json.dumps({**meta, "leaves": _described(arrays)}, sort_keys=True)
    (directory / "meta.json").write_text(text)
    manifest.write(directory)


def _host_form(tree: PyTree) -> dict[str, Any]:
    """{key: leaf}, PRNG keys as their data and numbers as arrays."""
    leaves = named_leaves(tree)
    form = {_key(name): _plain(name, leaf) for name, leaf in leaves}
    if len(form) != len(leaves):
        raise CheckpointError("two leaves of the state have the same path")
    return form


def _host_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    # A copy: NumPy's view of an array on the CPU is the very buffer that the next step donates.
    return {name: np.array(leaf, copy=True) for name, leaf in _host_form(tree).items()}


def _key(name: str) -> str:
    return name.replace("/", ".")  # orbax's own separator


def _plain(name: str, leaf: Any) -> Any:
    if _is_rng(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
        return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    raise CheckpointError(
        f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays and numbers"
    )


def _is_rng(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape))  # orbax stores no empty arrays; they come back from the target


def _described(form: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in form.items()}


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _revive(array: Any, like: Any) -> Any:
    """The stored array as the kind of leaf that the target holds."""
    if array is None:
        return like
    if _is_rng(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return type(like)(array) if isinstance(like, bool | int | float) else array


def _require_same(checkpoint: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(set(stored) | set(wanted)):
        if stored.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{checkpoint} holds {name}: {stored.get(name, 'nothing')}; "
                f"this run expects {wanted.get(name, 'nothing')}"
            )


def _put_aside(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error).lower() for text in _FULL_TEXT):
            return True
        error = error.__cause__ or error.__context__
    return False
