"""RoPE and its scalings against complex rotation, hand numbers and limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.position import Linear, Llama3, Ntk, Rope, Yarn


def rotated(rope, x, positions):
    return rope.rotate(x, rope.tables(positions, x.shape[-1]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_complex_rotation(key, interleaved):
    x = jax.random.normal(key, (2, 5, 3, 8))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 3, 100, 0, 1]])
    out = np.asarray(rotated(Rope(100.0, interleaved=interleaved), x, positions))
    pairs = (np.arange(0, 8, 2), np.arange(1, 8, 2)) if interleaved else (range(4), range(4, 8))
    z = np.asarray(x)[..., list(pairs[0])] + 1j * np.asarray(x)[..., list(pairs[1])]
    angle = np.asarray(positions)[..., None, None] * 100.0 ** (-np.arange(4) / 4)
    want = z * np.exp(1j * angle)
    np.testing.assert_allclose(out[..., list(pairs[0])], want.real, atol=2e-5)
    np.testing.assert_allclose(out[..., list(pairs[1])], want.imag, atol=2e-5)


def test_layouts_are_permutations_of_each_other(key):
    x, positions = jax.random.normal(key, (1, 6, 2, 8)), jnp.arange(6)[None]
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # half-split feature at interleaved place
    half = rotated(Rope(), x, positions)[..., order]
    np.testing.assert_allclose(
        rotated(Rope(interleaved=True), x[..., order], positions), half, atol=1e-6
    )
    assert (
        np.abs(rotated(Rope(interleaved=True), x, positions) - rotated(Rope(), x, positions)).max()
        > 0.1
    )


def test_scores_depend_on_the_difference_only(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 16))
    rope = Rope(1000.0)

    def score(m, n):
        at = [jnp.array([[p]]) for p in (m, n)]
        return (rotated(rope, q, at[0]) * rotated(rope, k, at[1])).sum()

    np.testing.assert_allclose(score(9, 4), score(105, 100), atol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_partial_rope_leaves_the_rest(key):
    x = jax.random.normal(key, (1, 4, 1, 16))
    out = rotated(Rope(fraction=0.5), x, jnp.arange(4)[None])
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(out[..., :8], rotated(Rope(), x[..., :8], jnp.arange(4)[None]))


def test_llama3_bands_by_hand():
    plain, scaled = Rope(500_000.0), Rope(500_000.0, scaling=Llama3(8.0))
    inverse, got = plain.frequencies(128), scaled.frequencies(128)
    for before, after in zip(inverse, got, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            want = before
        elif wavelength > 8192:
            want = before / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            want = (1 - smooth) * before / 8 + smooth * before
        assert after == pytest.approx(want, rel=1e-12)
    assert len(set(np.round(inverse / got, 6))) > 3  # the smooth band is there


def test_limits_of_the_scalings():
    plain = Rope(10_000.0).frequencies(64)
    for scaling in (Linear(1.0), Ntk(1.0), Llama3(1.0), Yarn(1.0, 2048)):
        np.testing.assert_allclose(Rope(10_000.0, scaling=scaling).frequencies(64), plain)
    ntk = Rope(10_000.0, scaling=Ntk(4.0)).frequencies(64)
    np.testing.assert_allclose(ntk, Rope(10_000.0 * 4 ** (64 / 62)).frequencies(64))
    assert plain[-1] / ntk[-1] == pytest.approx(4)
    yarn = Rope(10_000.0, scaling=Yarn(4.0, 2048)).frequencies(64)
    assert yarn[0] == plain[0] and yarn[-1] == pytest.approx(plain[-1] / 4)
    assert Yarn(4.0, 2048).amplitude == pytest.approx(1.1386294361)


def test_odd_rotated_size_is_refused():
    with pytest.raises(ValueError, match="pairs of features"):
        Rope(fraction=0.5).frequencies(6)
