"""The choice of a kernel is by shape, reported, and never silent."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attend import reference
from research.kernels.blockwise import blockwise
from research.kernels.mask import Mask
from research.kernels.native import unavailable
from research.kernels.select import KERNELS, attend_auto, kernel, kernel_name, picked


@pytest.fixture(params=[None, "has no compiler"], ids=["native", "blockwise"])
def tiled(request, monkeypatch):
    """What tiles are worked by on a CPU, with a compiler and without."""
    if request.param or unavailable():
        monkeypatch.setattr("research.kernels.select.unavailable", lambda: "has no compiler")
        return "blockwise"
    return "native"


def test_decoding_takes_the_reference_and_training_does_not(tiled):
    assert kernel_name(1, 4096) == "reference"
    assert kernel_name(8, 8) == "reference"
    assert kernel_name(256, 256) == kernel_name(2048, 2048) == tiled
    assert kernel_name(256, 256, dropout=True) == kernel_name(256, 256, biased=True) == "blockwise"


def test_a_gpu_takes_the_pallas_kernels_where_they_can():
    named = partial(kernel_name, S=2048, backend="gpu")
    assert named(2048, dtype=jnp.bfloat16) == "flash2"
    assert named(1, H=128, dtype=jnp.bfloat16) == "flash_decode"
    assert named(16, group=8, dtype=jnp.bfloat16) == "flash2"  # 128 rows of queries
    assert named(1, dropout=True) == named(2048, H=512) == named(2048, H=8) == "reference"
    assert named(2048, dtype=jnp.float64) == named(2048, dtype=None) == "reference"
    assert named(2048, backend="other gpu") == named(2048, backend="tpu") == "reference"


def test_auto_hands_a_gpus_kernels_what_they_take(monkeypatch, key):
    called = []

    def stand_in(name):
        def attend(q, k, v, mask, scale=None, softcap=None, dropout=None):
            called.append((name, dropout is not None))
            return reference(q, k, v, mask, scale, dropout, softcap)

        return attend

    monkeypatch.setattr("research.kernels.select.device_backend", lambda: "gpu")
    for name in ("flash2", "flash_decode", "reference"):
        monkeypatch.setitem(KERNELS, name, stand_in(name))
    q = jax.random.normal(key, (1, 32, 2, 16))
    attend_auto(q, q, q, Mask())
    attend_auto(q, q, q, Mask(), dropout=(0.1, key))
    attend_auto(q[:, :1], q, q, Mask(offset=31), softcap=2.0)
    attend_auto(q[:, :1], q, q, Mask(offset=31), dropout=(0.1, key))
    attend_auto(q, q.astype(jnp.bfloat16), q, Mask())
    assert called == [
        ("flash2", False),
        ("flash2", True),
        ("flash_decode", False),
        ("reference", True),
        ("reference", False),
    ]


def test_it_says_what_it_took(key, caplog, monkeypatch, tiled):
    monkeypatch.setattr("research.kernels.select._picked", {})  # a process says it once
    q = jax.random.normal(key, (1, 77, 1, 16))
    with caplog.at_level("INFO", "research.kernels.select"):
        for _ in range(2):
            attend_auto(q, q, q, Mask())
    said = "77 queries and 77 keys of 16 float32"
    assert caplog.messages == [f"attention of {said}: {tiled}"]
    assert picked()[said] == tiled


@pytest.mark.parametrize("T", [1, 64])
def test_auto_runs_the_kernel_it_names(key, T, tiled):
    q, k, v = (jax.random.normal(x, (1, 64, 2, 8)) for x in jax.random.split(key, 3))
    q, mask = q[:, -T:], Mask(offset=64 - T)
    program = str(jax.make_jaxpr(lambda *x: attend_auto(*x, mask))(q, k, v))
    name = kernel_name(T, 64)
    assert ("custom_vjp" in program, "native_forward" in program) == (T == 64, name == "native")
    np.testing.assert_allclose(
        attend_auto(q, k, v, mask, 0.2), reference(q, k, v, mask, 0.2), atol=2e-6
    )


def test_a_kernel_that_does_not_exist_is_an_error():
    assert kernel("blockwise") is blockwise
    with pytest.raises(ValueError, match="no attention kernel 'flash'; there are auto, block"):
        kernel("flash")


def test_a_kernel_on_the_wrong_device_is_an_error(key):
    q = jax.random.normal(key, (1, 64, 2, 16))
    for name in ("flash1", "flash2", "flash_decode", "cudnn"):
        with pytest.raises(ValueError, match=f"'{name}' runs on a GPU, and this is a cpu"):
            kernel(name)(q[:, :8], q[:, :8], q[:, :8], Mask())


def test_the_kernel_for_a_cpu_is_refused_elsewhere_before_it_is_compiled(key, monkeypatch):
    q = jax.random.normal(key, (1, 64, 2, 16))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("research.kernels.native.unavailable", lambda: pytest.fail("compiled"))
    with pytest.raises(ValueError, match="'native' runs on a CPU, and this is a gpu"):
        kernel("native")(q, q, q, Mask())
