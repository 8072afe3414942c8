import fcntl
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from perceptron import assert_bitwise, factored, objective, params, predict, rows, source

from research.train import manifest, retention
from research.train.checkpoint import CheckpointError
from research.train.directory import OtherRunError
from research.train.finite import NonFiniteError
from research.train.interrupt import Interrupted
from research.train.lock import InUseError
from research.train.loop import Training, fit
from research.train.metrics import read
from research.train.optim import SGD, AdamW
from research.train.retention import Best
from research.train.state import micro_rng
from research.types import Source


def error_of(tree):
    batch = rows(1, 0, 64)
    return {"error": float(jnp.mean(jnp.square(predict(tree, batch["x"]) - batch["y"])))}


def quick(steps, directory=None, optimizer=AdamW(0.03), **options):
    training = {"save_every": 2} if directory else {}
    training |= {name: options.pop(name) for name in list(options) if hasattr(Training, name)}
    config = Training(steps=steps, directory=directory, **training)
    return fit(objective, options.pop("source", source()), params(), optimizer, config, **options)


def test_learns_logs_and_evaluates(tmp_path, capsys):
    before = error_of(params())["error"]
    fitted = quick(60, tmp_path, evaluate=error_of, log_every=20, eval_every=30)
    assert fitted.evaluation["error"] < 0.5 * before
    assert fitted.evaluation == error_of(fitted.params)
    logged = read(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["split"]) for row in logged] == [
        (20, "train"),
        (30, "eval"),
        (40, "train"),
        (60, "train"),
        (60, "eval"),
    ]
    assert {"loss", "error", "grad_norm", "update_norm", "param_norm", "lr"} <= set(logged[0])
    shown = capsys.readouterr().out
    assert "step 20/60  loss " in shown and "left" in shown


def test_the_callers_arrays_are_left_alone():
    tree = params()
    before = jax.tree.map(np.array, tree)
    config = Training(steps=3, ema_decay=0.9)
    # The reference policy is the very same arrays.
    fit(objective, source(), tree, AdamW(0.1), config, context={"reference": tree})
    assert_bitwise(tree, jax.tree.map(jnp.asarray, before))


def test_frozen_leaves_come_back_bitwise_and_the_average_is_evaluated():
    tree = factored()
    seen = []

    def evaluate(params):
        seen.append(params)
        return error_of(params)

    config = Training(steps=5, ema_decay=0.5)
    fitted = fit(
        objective, source(), tree, SGD(0.1), config, rule=r".*/kernel/(a|b)", evaluate=evaluate
    )
    assert_bitwise(fitted.params["hidden"]["kernel"].base, tree["hidden"]["kernel"].base)
    assert_bitwise(seen[-1], fitted.ema)
    assert not np.array_equal(fitted.ema["hidden"]["kernel"].a, fitted.params["hidden"]["kernel"].a)


def test_a_finished_run_is_not_run_again_and_can_be_made_longer(tmp_path):
    first = quick(4, tmp_path)
    seen = []
    again = quick(4, tmp_path, source=source(seen=seen))
    assert seen == []
    assert_bitwise(again.state, first.state)
    longer = quick(8, tmp_path, source=source(seen=seen))
    assert [rows[0] // 8 for rows in seen] == [4, 5, 6, 7]
    assert_bitwise(longer.state, quick(8).state)
    with pytest.raises(ValueError, match="is at step 8, past steps=4"):
        quick(4, tmp_path)


def test_another_config_is_refused(tmp_path):
    quick(2, tmp_path, identity={"data": "a"})
    with pytest.raises(OtherRunError, match=r"optimizer.lr: 0.03 there, 0.5 now"):
        quick(2, tmp_path, AdamW(0.5), identity={"data": "a"})
    with pytest.raises(OtherRunError, match=r'identity.data: "a" there, "b" now'):
        quick(2, tmp_path, identity={"data": "b"})
    with pytest.raises(OtherRunError, match=r"training.seed"):
        quick(2, tmp_path, seed=1, identity={"data": "a"})
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        quick(2, tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_newest_checkpoint_costs_steps_but_not_the_result(tmp_path, capsys, damage):
    whole = quick(6, tmp_path)
    newest = tmp_path / "checkpoints" / "step_00000006"
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=os.path.getsize)
    raw = bytearray(victim.read_bytes())
    raw[-3] ^= 1
    victim.write_bytes(raw if damage == "flipped" else raw[: len(raw) // 2])
    again = quick(6, tmp_path)
    said = capsys.readouterr().out
    assert "step_00000006 is damaged" in said and "resumed from step 4" in said
    assert_bitwise(again.state, whole.state)
    manifest.check(newest)


def test_a_bad_batch_stops_the_run_and_says_where(tmp_path):
    def next_batch(state, *rest):
        batch, state = source().next(state, *rest)
        if state["position"] == 6:
            batch["x"][3, 2] = np.inf
        return batch, state

    poisoned = Source(source().init, next_batch)
    with pytest.raises(NonFiniteError) as caught:
        quick(9, tmp_path, source=poisoned)
    message = str(caught.value)
    assert message.startswith("step 5: grad_norm = nan")
    assert "gradients: hidden/kernel" in message and "batch: x" in message
    assert "indices [40, 41, 42" in message and "x float32[8, 4]" in message
    assert retention.steps(tmp_path / "checkpoints") == [2, 4]
    assert_bitwise(quick(9, tmp_path).state, quick(9).state)


def test_only_the_gradient_is_bad():
    def square_root_at_zero(tree, context, batch, rng):
        return jnp.sqrt(jnp.sum(jnp.square(tree["out"]["kernel"] * 0))), {}

    config = Training(steps=2)
    with pytest.raises(NonFiniteError, match=r"step 0: grad_norm = nan.*gradients: out/kernel"):
        fit(square_root_at_zero, source(), params(), SGD(0.1), config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, number, capsys):
    def next_batch(state, *rest):
        if state["position"] == 3:
            os.kill(os.getpid(), number)
        return source().next(state, *rest)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        quick(9, tmp_path, source=Source(source().init, next_batch), save_every=None)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert f"{number.name}: stopped after step 4; saved in" in capsys.readouterr().out
    assert_bitwise(quick(9, tmp_path, save_every=None).state, quick(9).state)


def test_the_best_checkpoint_stays(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 5.0])

    def evaluate(params):
        return {"nll": next(scores)}

    quick(8, tmp_path, evaluate=evaluate, eval_every=2, save_every=1, keep=1, keep_best=Best("nll"))
    assert retention.steps(tmp_path / "checkpoints") == [4, 8]
    meta = json.loads((tmp_path / "checkpoints" / "step_00000004" / "meta.json").read_text())
    assert meta["evaluation"] == {"nll": 1.0}


def test_a_failed_save_stops_the_run(tmp_path, monkeypatch):
    quick(2, tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        quick(8, tmp_path)
    assert retention.steps(tmp_path / "checkpoints") == [2]


def test_training_says_what_is_wrong_with_it():
    with pytest.raises(ValueError, match="accumulate must be at least 1, not 0"):
        Training(steps=1, accumulate=0)
    with pytest.raises(ValueError, match=r"need Training\.directory"):
        Training(steps=1, save_every=3)
    with pytest.raises(ValueError, match="needs an `evaluate`"):
        quick(1, "unused", keep_best=Best("nll"))


def test_a_bad_update_is_blamed_on_its_own_step():
    def scaled(updates, count, params=None):
        factor = jnp.where(count == 2, jnp.inf, 0.1)
        return jax.tree.map(lambda leaf: leaf * factor, updates), count + 1

    bad = optax.GradientTransformation(lambda params: jnp.int32(0), scaled)
    with pytest.raises(NonFiniteError, match=r"^step 2: update_norm = .* the optimizer's update"):
        quick(4, optimizer=bad)


def test_a_first_step_that_failed_does_not_keep_out_the_corrected_config(tmp_path):
    with pytest.raises(ValueError, match="do not split into 3"):
        quick(2, tmp_path, accumulate=3)
    (tmp_path / "metrics.jsonl").write_text("left over\n")
    assert_bitwise(quick(2, tmp_path, accumulate=2).state, quick(2, accumulate=2).state)
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [2]
    with pytest.raises(OtherRunError, match=r"training.accumulate: 2 there, 3 now"):
        quick(2, tmp_path, accumulate=3)


def test_another_base_is_refused(tmp_path):
    def run(tree):
        config = Training(steps=1, directory=tmp_path)
        fit(objective, source(), tree, SGD(0.1), config, rule=r".*/kernel/(a|b)")

    run(factored())
    tree = factored()
    run(tree)
    bias = tree["hidden"]["bias"].astype(jnp.float32).at[3].set(1e-30)
    tree["hidden"]["bias"] = bias
    with pytest.raises(OtherRunError, match=r"config \(frozen\.hidden/bias: [^;]*\)"):
        run(tree)


def test_two_runs_in_one_directory_are_refused(tmp_path):
    quick(2, tmp_path)
    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InUseError, match=f"in use by another run .process {os.getpid()}"):
            quick(4, tmp_path)
    quick(4, tmp_path)


def test_no_key_is_used_twice():
    keys = []

    def init(rng):
        keys.append(rng)
        return source().init(rng)

    def next_batch(state, params, context, rng, last_metrics):
        keys.append(rng)
        return source().next(state, params, context, rng, last_metrics)

    rng = quick(3, source=Source(init, next_batch)).state.rng
    keys += [micro_rng(rng, step, micro) for step in range(4) for micro in range(4)]
    fold = jax.random.fold_in  # as experiments make the keys of adapters and models
    keys += [fold(fold(jax.random.key(0), 1), index) for index in range(4)]
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 1 + 3 + 16 + 4
