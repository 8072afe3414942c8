"""Tables and packing against what they are derived from."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from research.codes import blocks
from research.codes.packing import pack, unpack
from research.codes.tables import TABLES, look_up, nearest


def test_nf4_is_made_of_normal_quantiles():
    edge = (1 - 1 / 30 + 1 - 1 / 32) / 2
    positive = norm.ppf(np.linspace(edge, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    table = np.sort([*positive, 0, *negative]) / positive.max()
    np.testing.assert_allclose(TABLES["NF4"], table, rtol=0, atol=2e-7)


def test_four_bit_floats_are_sign_exponent_and_fraction():
    def magnitude(code, exponent_bits, fraction_bits):
        exponent, fraction = divmod(code, 2**fraction_bits)
        bias = 2 ** (exponent_bits - 1) - 1
        if exponent == 0:
            return fraction / 2**fraction_bits * 2.0 ** (1 - bias)
        return (1 + fraction / 2**fraction_bits) * 2.0 ** (exponent - bias)

    for name, bits in {"E2M1": (2, 1), "E3M0": (3, 0)}.items():
        half = np.array([magnitude(code, *bits) for code in range(8)])
        np.testing.assert_allclose(TABLES[name], [*half / half[-1], *-half / half[-1]], rtol=1e-7)


@pytest.mark.parametrize("name", TABLES)
def test_the_nearest_entry_is_found(name):
    x = jnp.linspace(-1, 1, 4001)
    found = np.abs(look_up(nearest(x, name), name) - x)
    best = np.abs(TABLES[name][None] - np.asarray(x)[:, None]).min(-1)
    np.testing.assert_allclose(found, best, rtol=0, atol=1e-7)
    assert (look_up(nearest(jnp.asarray(TABLES[name]), name), name) == TABLES[name]).all()


def test_between_two_entries_the_lower_is_taken():
    ascending = np.sort(TABLES["NF4"])
    middles = (ascending[1:] + ascending[:-1]) / np.float32(2)
    assert nearest(jnp.asarray(middles), "NF4").tolist() == list(range(15))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_inverted_and_takes_its_bits(bits):
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**bits, (3, 24)), jnp.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, 3 * bits)
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    digits = "".join(format(int(code), f"0{bits}b") for code in codes[0])
    assert digits == "".join(format(int(byte), "08b") for byte in packed[0])


def test_packing_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="2, 3, 4, 8 bits, not 5"):
        pack(jnp.zeros((8,), jnp.uint8), 5)
    with pytest.raises(ValueError, match="8 at a time, which does not divide 12"):
        pack(jnp.zeros((12,), jnp.uint8), 3)


def test_blocks_of_nothing_and_of_numbers_too_small_for_float32_are_zeros():
    x = jnp.concatenate([jnp.zeros(64), jnp.full(64, 1e-39), jnp.full(5, -2.0)])
    codes, absmax = blocks.encode(x, "NF4", 64)
    assert codes.shape == (133,) and absmax.shape == (3,)
    decoded = blocks.decode(codes, absmax, "NF4", 64)
    np.testing.assert_array_equal(decoded, [*[0.0] * 128, *[-2.0] * 5])
