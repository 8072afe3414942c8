"""Codes, scales and values against bitsandbytes 0.50.2 on a CPU, bit for bit.

The arrays are what scripts/references/bitsandbytes_blocks.py writes. Two things are ours: a block whose
numbers are all denormal counts as zeros, and a short last block of 4-bit codes that is all zeros has
the scale 0 (theirs 1e-38). There they also divide by the scale where they multiply by its inverse
elsewhere, which no array here shows.
"""

import os
import subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.codes import blocks
from research.codes.packing import pack
from research.codes.steps import nearest_step
from research.codes.tables import TABLES
from research.weights import double
from research.weights.formats import Codebook
from research.weights.quantized import encode

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".references" / "venv" / "bin" / "python"
FIXTURE = Path(__file__).parent / "fixtures" / "bitsandbytes.safetensors"
CASES = ["random", "spread", "constant", "zero", "nearly_zero", "odd"]


def assert_same(ours, found, case, kind):
    for part, array in ours.items():
        name = f"{case}.{kind}.{part}"
        array, theirs = np.asarray(array), found[name]
        assert (array.dtype, array.size) == (theirs.dtype, theirs.size), name
        np.testing.assert_array_equal(array.reshape(theirs.shape), theirs, err_msg=name)


@partial(jax.jit, static_argnames="kind")
def four_bits(x, kind):
    """blocks alone, along a flat array of any length. Their odd code is followed by that of 0."""
    table = kind.upper()
    codes, absmax = blocks.encode(x, table, 64)
    even = jnp.pad(codes, (0, len(codes) % 2), constant_values=7 if kind == "nf4" else 0)
    nested = double.quantize(absmax[None])
    return {
        "packed": pack(even, 4),
        "absmax": absmax,
        "values": blocks.decode(codes, absmax, table, 64),
        "codes": nested.codes,
        "absmax2": nested.absmax,
        "offset": nested.offset,
        "values2": blocks.decode(codes, nested.values()[0], table, 64),
    }


@partial(jax.jit, static_argnames="table")
def eight_bits(x, table):
    """Codes that bitsandbytes finds in its table of steps; a block of zeros has its first code."""
    codes, absmax = blocks.encode(x, table, 256, nearest_step)
    codes = jnp.where(jnp.repeat(absmax == 0, 256)[: len(x)], 0, codes)
    return {"codes": codes, "absmax": absmax, "values": blocks.decode(codes, absmax, table, 256)}


def check_matrix(found, case, kind):
    """A Weight whose rows are those that bitsandbytes flattens."""
    w = encode(jnp.asarray(found[f"{case}.x"]), Codebook(kind.upper(), double=True), False)
    ours = {"packed": w.codes, "values2": jax.jit(type(w).values)(w), "codes": w.scale.codes}
    assert_same(ours | {"offset": w.scale.offset}, found, case, kind)


def check(found):
    for name, table in {"dynamic": "DYNAMIC", "dynamic_unsigned": "DYNAMIC_UNSIGNED"}.items():
        np.testing.assert_array_equal(TABLES[table], found[name])
    for case in CASES:
        x = jnp.asarray(found[f"{case}.x"]).reshape(-1)
        for kind in ("nf4", "fp4"):
            assert_same(four_bits(x, kind), found, case, kind)
        assert_same(eight_bits(x, "DYNAMIC"), found, case, "signed")
        assert_same(eight_bits(jnp.abs(x), "DYNAMIC_UNSIGNED"), found, case, "unsigned")
    for kind in ("nf4", "fp4"):
        check_matrix(found, "random", kind)


def test_everything_has_the_numbers_of_the_fixture():
    check(load_file(FIXTURE))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_denormal_numbers_count_as_zeros(kind):
    found = load_file(FIXTURE)
    x, theirs = found["denormal.x"], found[f"denormal.{kind}.values"]
    assert 0 < np.abs(x[:64]).max() < 1e-38
    ours = blocks.decode(*blocks.encode(jnp.asarray(x), kind.upper(), 64), kind.upper(), 64)
    assert not np.any(ours[:64])
    np.testing.assert_array_equal(ours[64:], theirs[64:])


@pytest.mark.reference
@pytest.mark.skipif(not PYTHON.exists(), reason="no reference libraries in .references/venv")
def test_the_library_still_writes_the_fixture_and_agrees_on_larger_arrays(tmp_path):
    script = ROOT / "scripts" / "references" / "bitsandbytes_blocks.py"
    done = subprocess.run(
        [PYTHON, script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    again, committed = load_file(tmp_path / FIXTURE.name), load_file(FIXTURE)
    assert again.keys() == committed.keys()
    for name, array in committed.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    check(load_file(tmp_path / "large.safetensors"))
