"""Attention in C++ against the reference form, with the cases of `blockwise`; its compiler; its bits."""

import os
import shlex
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, MANY, operands, stack, temporary_bytes, value_and_grads

from research.kernels import build
from research.kernels import native as module
from research.kernels.attend import reference
from research.kernels.blockwise import blockwise
from research.kernels.mask import Mask
from research.kernels.native import native, unavailable
from research.kernels.select import attend_auto, kernel_name

SEEN = {name: case for name, case in CASES.items() if case[0].slopes is None}
pytestmark = pytest.mark.skipif(unavailable() is not None, reason="no C++ compiler")


def close(ours, theirs, error=2e-6):
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=error * max(1, np.abs(y).max()))


def heads_of(key, H, T, S, N=4, K=2, B=2):
    keys = jax.random.split(key, 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(x, shape) for x, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("name", SEEN)
def test_values_and_gradients_equal_the_reference(key, name):
    mask, N, K = SEEN[name]
    args = (*operands(key, N, K), mask)
    close(value_and_grads(native, *args), value_and_grads(reference, *args))


@pytest.mark.parametrize("name", MANY)
def test_masks_over_many_blocks(key, name):
    mask, N, K = MANY[name]
    args = (*operands(key, N, K, T=150, S=190), mask)
    close(value_and_grads(native, *args), value_and_grads(reference, *args))


@pytest.mark.parametrize("H", [8, 64, 80, 128, 256])
@pytest.mark.parametrize(("T", "S"), [(1, 64), (37, 37), (64, 128), (300, 1000)])
def test_lengths_and_heads_that_fill_blocks_or_do_not(key, H, T, S):
    args = (*heads_of(key, H, T, S), Mask(offset=S - T))
    close(value_and_grads(native, *args), value_and_grads(reference, *args), 4e-6)


@pytest.mark.parametrize("window", [1, 20, 200])
def test_windows_over_many_blocks(key, window):
    args = (*heads_of(key, 16, 300, 300, N=3, K=3), Mask(window=window))
    close(value_and_grads(native, *args), value_and_grads(reference, *args), 4e-6)


def test_a_segment_for_every_token(key):
    ids = jnp.broadcast_to(jnp.arange(1, 101), (2, 100))
    args = (*heads_of(key, 16, 100, 100), Mask(query_segments=ids, key_segments=ids))
    ours = value_and_grads(native, *args)
    close(ours, value_and_grads(reference, *args))
    np.testing.assert_allclose(ours[0], jnp.repeat(args[2], 2, axis=2), atol=1e-6)


def test_rows_that_see_nothing_are_zero_and_keys_nobody_sees_have_no_gradient(key):
    ids = jnp.ones((2, 100), int).at[0, :70].set(0).at[1].set(0)
    mask = Mask(query_segments=ids, key_segments=ids)
    for x in value_and_grads(native, *heads_of(key, 16, 100, 100), mask):
        assert np.all(np.isfinite(x)) and np.any(x[0, 70:])
        assert not np.any(x[0, :70]) and not np.any(x[1])


NAN, CUDAS_NAN = (np.array(bits, np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FFFFFFF))


@pytest.mark.parametrize("nan", [NAN, CUDAS_NAN, -CUDAS_NAN])
def test_nan_reaches_who_sees_it_and_nobody_else(key, nan):
    q, k, v, _ = heads_of(key, 16, 64, 256)
    wanted = reference(q, k, v, Mask())
    k, v = (x.at[:, 64:].set(nan) for x in (k, v))  # a tile that causal queries never read
    close([native(q, k, v, Mask())], [wanted])
    out = native(q, k.at[0, 10].set(nan), v, Mask())
    assert np.all(np.isfinite(out[0, :10])) and np.all(np.isnan(out[0, 10:]))
    assert np.all(np.isfinite(out[1]))


def test_large_and_infinite_scores(key):
    q, k, v, weights = heads_of(key, 16, 100, 100)
    args = (q * 1e3, k, v, weights, Mask())
    # A score of thousands is a multiple of 1e-4 in float32, and so are the powers' errors.
    close(value_and_grads(native, *args), value_and_grads(reference, *args), 3e-4)
    low = k.at[:, 3].set(-jnp.inf * jnp.sign(k[:, 3]))
    q = jnp.abs(q) * jnp.sign(k[:, 3:4]).repeat(2, axis=2)  # so that every score of key 3 is -inf
    close([native(q, low, v, Mask())], [reference(q, low, v, Mask())])


def test_bfloat16_is_no_worse_than_the_reference_in_bfloat16(key):
    exact = [x.astype(jnp.bfloat16) for x in heads_of(key, 64, 200, 200)]
    oracle = value_and_grads(reference, *(x.astype(jnp.float32) for x in exact), Mask())
    args = (*exact[:3], exact[3].astype(jnp.float32), Mask())
    results = value_and_grads(native, *args), value_and_grads(reference, *args), oracle
    for ours, theirs, true in zip(*results, strict=True):
        assert ours.dtype == jnp.bfloat16
        error, allowed = (np.abs(np.asarray(x, np.float32) - true).max() for x in (ours, theirs))
        assert error <= 1.5 * allowed


def test_an_offset_may_be_traced(key):
    q, k, v, _ = heads_of(key, 16, 96, 96)
    whole = reference(q, k, v, Mask(window=40))
    step = jax.jit(lambda q, offset: native(q, k, v, Mask(window=40, offset=offset)))
    chunks = [step(q[:, i : i + 32], jnp.int32(i)) for i in range(0, 96, 32)]
    close([jnp.concatenate(chunks, axis=1)], [whole])


def test_in_scan_and_checkpoint_and_vmap(key):
    q, k, v, _ = operands(key, 2, 2)
    grads = [
        jax.jit(jax.grad(partial(stack, attend, policy=None), (0, 1, 2)))(q, k, v)
        for attend in (native, reference)
    ]
    close(*grads)
    many = [x[:, None] for x in (q, k, v)]
    close([jax.vmap(lambda *x: native(*x, Mask()))(*many)[:, 0]], [reference(q, k, v, Mask())])


def test_saving_what_is_named_attention_spares_the_second_forward_pass(key):
    q, k, v, _ = operands(key, 2, 2)

    def passes(policy):
        program = jax.jit(jax.grad(partial(stack, native, policy=policy))).lower(q, k, v).as_text()
        return program.count("@native_forward"), program.count("@native_backward")

    names = jax.checkpoint_policies.save_only_these_names("attention")
    assert (passes(None), passes(names)) == ((2, 1), (1, 1))


def test_on_a_mesh_of_devices(key):
    args = (*operands(key, 4, 2, B=4), Mask())
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=auto)
    sharding = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    placed = (*(jax.device_put(x, sharding) for x in args[:-1]), Mask())
    close(value_and_grads(native, *placed), value_and_grads(reference, *args))


def test_temporary_memory_grows_with_the_length():
    short, long = (temporary_bytes(native, length) for length in (1024, 2048))
    assert long < 2.2 * short
    assert long < 1.5 * temporary_bytes(blockwise, 2048)


BITS = """
import os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:int(sys.argv[1])])
import hashlib, jax, jax.numpy as jnp
from research.kernels.mask import Mask
from research.kernels.native import native
q, k, v = (jax.random.normal(x, (1, 500, 3, 16)) for x in jax.random.split(jax.random.key(0), 3))
out, grads = jax.value_and_grad(lambda *x: (native(*x, Mask()) ** 2).sum(), (0, 1, 2))(q, k, v)
print(hashlib.sha256(b"".join(jax.device_get(x).tobytes() for x in grads)).hexdigest())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_no_bit_depends_on_the_number_of_threads():
    runs = [
        subprocess.run([sys.executable, "-c", BITS, threads], capture_output=True, text=True)
        for threads in "122"
    ]
    assert len({run.stdout for run in runs}) == 1 and runs[0].stdout, runs[0].stderr


def test_what_it_cannot_do_is_refused_and_auto_takes_another(key):
    q = jax.random.normal(key, (1, 64, 2, 16))
    slopes = Mask(slopes=jnp.array([0.5, 0.25]))
    with pytest.raises(ValueError, match="'native' has no slopes in its mask: choose 'auto'"):
        native(q, q, q, slopes)
    assert kernel_name(64, 64, biased=True) == kernel_name(64, 64, dropout=True) == "blockwise"
    close([attend_auto(q, q, q, slopes)], [reference(q, q, q, slopes)])
    close([attend_auto(q, q, q, Mask(), softcap=2.0)], [reference(q, q, q, Mask(), softcap=2.0)])


@pytest.fixture
def forgetful():
    unavailable.cache_clear()
    yield
    unavailable.cache_clear()


def test_without_a_compiler_blockwise_takes_its_place_and_says_so(
    key, forgetful, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert [kernel_name(64, 64) for _ in range(2)] == ["blockwise"] * 2
    assert len(caplog.messages) == 1 and "looked for CXX=no-such-compiler" in caplog.text
    q = jax.random.normal(key, (1, 64, 2, 16))
    with pytest.raises(ValueError, match="'native' could not be compiled"):
        native(q, q, q, Mask())


def test_a_place_that_cannot_be_written_is_no_compiler_either(forgetful, monkeypatch, tmp_path):
    (tmp_path / "native").write_text("a file where a folder should be")
    monkeypatch.setattr(build, "directory", lambda kind: tmp_path / kind)
    assert kernel_name(64, 64) == "blockwise"
    assert "Not a directory" in unavailable() or "exists" in unavailable()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that libraries are kept under instead of the user's."""
    monkeypatch.setattr(build, "directory", lambda kind: tmp_path / kind)
    return tmp_path


def test_what_a_compiler_says_is_passed_on(elsewhere):
    source = elsewhere / "broken.cc"
    source.write_text("int broken( {\n")
    with pytest.raises(build.BuildError, match=r"(?s)broken\.cc -o .*status 1:.*expected"):
        build.library(source)
    assert not list((elsewhere / "native").iterdir())


def test_a_library_is_made_once_and_anew_when_its_source_changes(elsewhere, monkeypatch):
    source = elsewhere / "answer.cc"
    for answer in (41, 42):
        source.write_text(f'extern "C" int answer() {{ return {answer}; }}\n')
        assert build.library(source).answer() == answer
    made = sorted((elsewhere / "native").iterdir())
    before = [path.stat().st_mtime_ns for path in made]
    assert build.library(source).answer() == 42 and len(made) == 2
    assert [path.stat().st_mtime_ns for path in made] == before
    monkeypatch.setenv("CXX", f"env {shlex.join(build.find_compiler())}")  # a wrapper
    assert build.library(source).answer() == 42


def test_a_damaged_library_is_made_anew(elsewhere):
    source = elsewhere / "answer.cc"
    source.write_text('extern "C" int answer() { return 43; }\n')
    folder = elsewhere / "native"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:  # writes half of a file where the library will be
        patch.setattr(build, "_compile", lambda compiler, source, target: target.write_text("half"))
        with pytest.raises(build.BuildError, match=r"too short|invalid"):
            build.library(source)
    assert build.library(source).answer() == 43


@pytest.mark.parametrize("length", [1, 16, 63, 64, 65, 100, 1000, 4096])
def test_blocks_pad_little(length):
    block = module._even(length)
    assert block <= module.BLOCK and block % module.MULTIPLE == 0
    assert -(-length // block) == -(-length // module.BLOCK)
