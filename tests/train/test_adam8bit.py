"""8-bit AdamW against bitsandbytes' on a CPU: scripts/references/bitsandbytes_adamw.py."""

import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from perceptron import assert_bitwise, objective, params, source
from safetensors.numpy import load_file

from research.codes import blocks
from research.codes.steps import nearest_step
from research.train.adam8bit import FIRST, SECOND, scale_by_adam8bit
from research.train.loop import Training, fit
from research.train.optim import AdamW8bit, optimizer
from research.train.sharding import follow, make_mesh, shardings
from research.types import Source

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".references" / "venv" / "bin" / "python"
FIXTURE = Path(__file__).parent / "fixtures" / "adamw8bit.safetensors"
NAMES = ("kernel", "odd", "small")


def gradients(step, tree):
    """As in the script that made the fixture."""
    found = {}
    for number, name in enumerate(NAMES):
        shape, own = tree[name].shape, np.random.default_rng(100 + number)
        size, mean = np.exp(0.7 * own.normal(size=shape)), own.normal(size=shape)
        noise = np.random.default_rng([number, step]).normal(size=shape)
        found[name] = (size * (mean + noise)).astype(np.float32)
    return found


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


class InSteps(AdamW8bit):
    """Codes found as bitsandbytes finds them on a CPU."""

    def direction(self):
        return scale_by_adam8bit(self.b1, self.b2, self.eps, self.min_size, nearest_step)


def check(found, kind, share, same_codes):
    """After 100 steps it is within `share` of the library's own quantization error of the library; after
    the first, so large a part of the codes are the library's."""
    tree = {name: jnp.asarray(found[f"{name}.start"]) for name in NAMES}
    update = optimizer(kind(1e-2, 0.1, None, decay=((".*", True),), b2=0.98), tree)
    state, sums = update.init(tree), dict.fromkeys(NAMES, 0.0)

    @jax.jit
    def move(tree, state, grads):
        moves, state = update.update(grads, state, tree)
        return optax.apply_updates(tree, moves), state

    for step in range(100):
        grads = gradients(step, tree)
        sums = {name: sums[name] + grads[name].sum(dtype=np.float64) for name in NAMES}
        tree, state = move(tree, state, grads)
        if step == 0:
            check_first(found, state, same_codes)
    for name in NAMES:
        np.testing.assert_allclose(sums[name], found[f"{name}.checksum"], rtol=1e-5)
        ours, eight, exact = tree[name], found[f"{name}.eight"], found[f"{name}.float"]
        if name == "small":  # float32 moments
            np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)
            continue
        own_error = rms(eight - exact)
        assert 1e-5 < own_error < 0.05 * rms(exact - found[f"{name}.start"])
        assert rms(ours - eight) < share * own_error
        assert rms(ours - exact) < 1.1 * own_error


def check_first(found, state, same_codes):
    """The moments after one step; theirs are looked up at steps of 3e-5 of a block's largest."""
    state = (
        optax.tree.get(state, "mu"),
        optax.tree.get(state, "nu"),
        *(optax.tree.get(state, f"{moment}_absmax") for moment in ("mu", "nu")),
    )
    for name in ("kernel", "odd"):
        for number, table in enumerate((FIRST, SECOND)):
            codes, absmax = state[number][name].reshape(-1), state[number + 2][name]
            assert codes.dtype == jnp.uint8
            theirs = found[f"{name}.first.state{number + 1}"].reshape(-1)
            largest = found[f"{name}.first.absmax{number + 1}"]
            np.testing.assert_allclose(absmax, largest, rtol=1e-6)
            assert np.mean(np.asarray(codes) == theirs) >= same_codes
            other = blocks.decode(jnp.asarray(theirs), jnp.asarray(largest), table, 256)
            off = np.abs(blocks.decode(codes, absmax, table, 256) - other)
            assert (off <= 0.015 * np.repeat(largest, 256)[: len(off)]).all()


def test_it_follows_bitsandbytes_for_100_steps_within_its_quantization_error():
    check(load_file(FIXTURE), AdamW8bit, share=0.75, same_codes=0.9)


def test_with_codes_found_as_there_it_is_the_same_optimizer():
    check(load_file(FIXTURE), InSteps, share=0.03, same_codes=0.999)


@pytest.mark.reference
@pytest.mark.skipif(not PYTHON.exists(), reason="no reference libraries in .references/venv")
def test_it_follows_the_library_as_it_runs(tmp_path):
    script = ROOT / "scripts" / "references" / "bitsandbytes_adamw.py"
    done = subprocess.run(
        [PYTHON, script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    check(load_file(tmp_path / FIXTURE.name), InSteps, share=0.03, same_codes=0.999)


class Stop(Exception):
    pass


def test_stopped_and_resumed_it_ends_bitwise_the_same(tmp_path):
    def train(directory, at=None):
        inner = source(8)

        def next_batch(state, *rest):
            if state["position"] == at:
                raise Stop
            return inner.next(state, *rest)

        config = Training(steps=5, save_every=2, directory=directory)
        optimizer = AdamW8bit(0.02, min_size=32)
        return fit(objective, Source(inner.init, next_batch), params(), optimizer, config)

    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "stopped", at=3)
    resumed = train(tmp_path / "stopped")
    assert optax.tree.get(resumed.state.opt_state, "mu")["hidden"]["kernel"].dtype == jnp.uint8
    assert_bitwise(resumed.state, whole.state)


def test_two_bytes_and_a_32nd_are_kept_for_a_parameter():
    n = 64 * 4096
    tree = {"kernel": jax.ShapeDtypeStruct((64, 4096), jnp.float32)}
    state = jax.eval_shape(scale_by_adam8bit().init, tree)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert held == n * (2 + 2 * 4 / 256) + 4  # and the count of steps
    tree = {"scale": jax.ShapeDtypeStruct((4095,), jnp.float32)}
    state = jax.eval_shape(scale_by_adam8bit().init, tree)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) == 8 * 4095 + 4


def test_without_gradient_nothing_moves():
    g = jnp.zeros((300,)).at[7].set(3.0)
    update = scale_by_adam8bit(min_size=1)
    state = update.init({"kernel": g})
    for _ in range(2):
        direction, state = update.update({"kernel": g}, state)
    assert np.flatnonzero(direction["kernel"]).tolist() == [7]
    np.testing.assert_allclose(direction["kernel"][7], 1.0, rtol=1e-5)


def test_a_small_moment_that_was_rounded_away_does_not_make_a_great_step():
    """Beside a gradient of 1 in its block the square of 3e-4 is nearest to code 0; then it falls silent."""
    g = jnp.zeros((300,)).at[7].set(1.0).at[8].set(3e-4)
    update = scale_by_adam8bit(min_size=1)
    _, state = update.update({"kernel": g}, update.init({"kernel": g}))
    direction, _ = update.update({"kernel": jnp.zeros((300,))}, state)
    assert np.abs(direction["kernel"]).max() < 1
    assert direction["kernel"][7] > 0.5 and direction["kernel"][8] > 0


def test_codes_live_where_their_parameter_does_and_scales_everywhere():
    mesh, tree = make_mesh(1, 2, 1), {"kernel": jnp.ones((64, 80))}
    homes, _ = shardings({"kernel": ("embed", None)}, tree, mesh)
    tree = jax.device_put(tree, homes)
    found = follow(jax.eval_shape(scale_by_adam8bit().init, tree), tree, mesh)
    for moment in (found.mu, found.nu):
        assert moment["kernel"] == homes["kernel"] and not moment["kernel"].is_fully_replicated
    for absmax in (found.mu_absmax, found.nu_absmax):
        assert absmax["kernel"].is_fully_replicated
