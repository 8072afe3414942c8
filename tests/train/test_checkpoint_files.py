import errno
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from perceptron import assert_bitwise, factored

from research.train import checkpoint, manifest, retention
from research.train.checkpoint import CheckpointError
from research.train.partition import partition
from research.train.retention import Best
from research.train.state import initial_state


def state(seed=0):
    trainable, _ = partition(factored(seed), r".*/kernel/(a|b)|out/kernel")
    source_state = {"position": 7, "kl": 0.1, "done": False, "buffer": np.arange(5), "none": None}
    source_state |= {"empty": np.zeros((0, 3), np.float32), "half": jnp.ones(3, jnp.bfloat16)}
    made = initial_state(trainable, optax.adam(0.1), jax.random.key(seed), source_state, ema=True)
    return made.replace(step=jnp.int32(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    for seed in (1, 2):
        checkpoint.save(directory, seed, state(seed), {"evaluation": None})
    return directory


def test_round_trip_keeps_bits_types_holes_and_keys(saved):
    target = state(0)
    restored = checkpoint.restore_newest(saved, target)
    assert restored.step == 2
    assert_bitwise(restored.tree, state(2))
    kernel = restored.tree.trainable["hidden"]["kernel"]
    assert type(kernel) is type(target.trainable["hidden"]["kernel"]) and kernel.base is None
    kinds = jax.tree.map(type, restored.tree.source_state)
    assert kinds == jax.tree.map(type, target.source_state)
    assert jax.random.key_impl(restored.tree.rng) == jax.random.key_impl(target.rng)


def damage_each(directory):
    """(what, function that does it) for every file of a checkpoint."""

    def flip(path):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0x10
        path.write_bytes(raw)

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-1])

    for path in sorted(directory.rglob("*")):
        if path.is_file():
            for damage in (flip, truncate, type(path).unlink):
                yield path.relative_to(directory), damage


def test_any_damage_to_any_file_is_found(saved, tmp_path):
    good = saved / "step_00000002"
    cases = list(damage_each(good))
    assert {"manifest.json", "meta.json"} < {str(name) for name, _ in cases} and len(cases) > 20
    for name, damage in cases:
        copy = tmp_path / "copy"
        shutil.copytree(good, copy)
        manifest.check(copy)
        damage(copy / name)
        with pytest.raises(manifest.DamagedError, match=name.name.replace(".", r"\.")):
            manifest.check(copy)
        shutil.rmtree(copy)


def test_every_bit_of_the_manifest_counts(tmp_path):
    (tmp_path / "state").write_bytes(b"weights")
    manifest.write(tmp_path)
    path = tmp_path / manifest.NAME
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in (0, 5):
            path.write_bytes(
                good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :]
            )
            with pytest.raises(manifest.DamagedError):
                manifest.check(tmp_path)


def test_a_file_that_does_not_belong_is_found(saved, tmp_path):
    copy = shutil.copytree(saved / "step_00000001", tmp_path / "copy")
    (copy / "state" / "more").write_text("")
    with pytest.raises(manifest.DamagedError, match="state/more is not in the manifest"):
        manifest.check(copy)


def test_the_one_before_is_used_and_said(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    victim = directory / "step_00000002" / "meta.json"
    victim.write_text(victim.read_text().replace("float32", "float64", 1))
    said = []
    restored = checkpoint.restore_newest(directory, state(0), said.append)
    assert restored.step == 1
    assert_bitwise(restored.tree, state(1))
    assert "step_00000002 is damaged (meta.json: its sha256 differs" in said[0]
    assert (directory / "damaged_step_00000002").exists()
    (directory / "step_00000001" / manifest.NAME).unlink()
    for _ in range(2):  # a second attempt must not start from scratch either
        with pytest.raises(CheckpointError, match="no sound checkpoint is left"):
            checkpoint.restore_newest(directory, state(0), said.append)


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.restore_newest(tmp_path, state(0)) is None


def test_another_shape_is_an_error(saved):
    target = state(0)
    target.source_state["buffer"] = np.arange(6)
    with pytest.raises(CheckpointError, match=r"source_state.buffer: int64\[5\].*int64\[6\]"):
        checkpoint.restore_newest(saved, target)


def test_a_leaf_that_cannot_be_stored_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="name is a str"):
        checkpoint.save(tmp_path, 1, {"name": "x"})


@pytest.mark.parametrize("where", ["mkdir", "manifest"])
def test_a_full_disk_leaves_earlier_checkpoints(saved, tmp_path, monkeypatch, where):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "manifest":
        monkeypatch.setattr(manifest, "write", full)
    else:
        monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(CheckpointError, match=r"step 3 could not be saved.*the disk is full"):
        checkpoint.save(directory, 3, state(3))
    assert sorted(path.name for path in directory.iterdir()) == ["step_00000001", "step_00000002"]
    assert checkpoint.restore_newest(directory, state(0)).step == 2


def test_killed_at_the_rename_the_earlier_one_counts_and_the_next_save_works(
    saved, tmp_path, monkeypatch
):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")

    def killed(*_):
        raise KeyboardInterrupt  # no handler of ours runs, as with SIGKILL

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(directory), "rename", killed)
        checkpoint.save(directory, 3, state(3))
    assert (directory / ".step_00000003.partial" / manifest.NAME).exists()
    assert checkpoint.restore_newest(directory, state(0)).step == 2
    checkpoint.save(directory, 3, state(3))
    restored = checkpoint.restore_newest(directory, state(0))
    assert restored.step == 3 and not list(directory.glob(".*"))
    assert_bitwise(restored.tree, state(3))


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path):
    """The operating system refuses in the middle of orbax's own writing."""
    big = {"table": np.random.default_rng(0).normal(size=200_000)}
    checkpoint.save(tmp_path, 1, {"table": big["table"][:10]})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="the disk is full"):
            checkpoint.save(tmp_path, 2, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_keep_newest_and_best(tmp_path):
    best = Best("accuracy", "highest")
    saver = checkpoint.BackgroundSaver(tmp_path, keep=2, best=best)
    for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, 0.1)):
        evaluation = None if accuracy is None else {"accuracy": accuracy}
        saver.save(step, {"w": np.ones(2)}, {"evaluation": evaluation})
    saver.wait()
    assert retention.steps(tmp_path) == [2, 4, 5]
    assert retention.best_score(tmp_path, best) == -0.9


def test_a_background_save_copies_first_and_raises_later(tmp_path, monkeypatch):
    saver = checkpoint.BackgroundSaver(tmp_path, keep=2)
    array = np.ones(3)
    saver.save(1, {"w": array}, {"evaluation": None})
    array[:] = 7.0
    saver.wait()
    restored = checkpoint.restore_newest(tmp_path, {"w": array})
    np.testing.assert_array_equal(restored.tree["w"], 1.0)
    monkeypatch.setattr(manifest, "write", lambda _: 1 / 0)
    saver.save(2, {"w": array}, {"evaluation": None})
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        saver.wait()
    saver.wait()  # said once
    assert retention.steps(tmp_path) == [1]


def test_sweep_removes_what_a_killed_process_left(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.copytree(directory / "step_00000001", directory / ".step_00000003.partial")
    retention.sweep(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["step_00000001", "step_00000002"]
