"""Spectra of matrices made with known singular values, and LoRA's section 7 against its own numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evaluate import spectrum
from research.models import decoder
from research.models.families.llama import llama
from research.paths import RuleError
from research.weights import lora, merge
from research.weights.base import is_weight

MODEL = decoder.Decoder(llama(40, 3, 16, 4, 2, 24, tied=True, init_std=0.3))
VALUES = np.array([[4.0, 2.0, 1.0, 0.5], [3.0, 3.0, 0.0, 0.0]], np.float32)  # two layers


def orthonormal(seed, *shape):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=shape))[0].astype(np.float32)


U, V = orthonormal(0, 2, 12, 4), orthonormal(1, 2, 9, 4)
MATRIX = (U * VALUES[:, None]) @ V.swapaxes(-1, -2)


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


def tuned(params, rule=r".*/(q|down)/kernel|embed/table", rank=3, seed=1):
    """LoRAs whose product is not zero."""
    key = jax.random.key(seed)
    params = lora.add(params, rule, key, rank=rank, alpha=2 * rank)
    return jax.tree.map(lambda w: _filled(w, key), params, is_leaf=is_weight)


def _filled(w, key):
    if not isinstance(w, lora.LoRA):
        return w
    a, b = (
        jax.random.normal(jax.random.fold_in(key, n), f.shape) for n, f in enumerate((w.a, w.b))
    )
    return w.replace(a=a, b=b)


def product(one):
    return (one.left * one.values[..., None, :]) @ jnp.swapaxes(one.right, -1, -2)


def test_values_and_directions_of_a_made_up_matrix():
    found = spectrum.decompose(jnp.asarray(MATRIX))
    np.testing.assert_allclose(found.values[:, :4], VALUES, atol=1e-5)
    assert found.values.shape == (2, 9) and not np.any(found.values[:, 4:] > 1e-5)
    np.testing.assert_allclose(product(found), MATRIX, atol=1e-5)
    # Up to sign, for values of their own.
    cosines = np.einsum("di,di->i", found.left[0, :, :4], U[0])
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)
    np.testing.assert_allclose(
        np.einsum("di,di->i", found.right[0, :, :4], V[0]), cosines, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(12, 3, 9), (5, 7, 9), (12, 7, 5), (4, 1, 4)])
def test_thin_factors_have_the_spectrum_of_their_product(shape):
    rows, rank, columns = shape
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, rows, rank)), rng.normal(size=(2, rank, columns))
    found = spectrum.decompose_product(jnp.asarray(a), jnp.asarray(b), scale=0.5)
    count = min(shape)
    assert found.left.shape == (2, rows, count) and found.right.shape == (2, columns, count)
    wanted = np.linalg.svd(0.5 * a @ b, compute_uv=False)  # float64
    np.testing.assert_allclose(found.values, wanted[:, :count], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(product(found), 0.5 * a @ b, atol=1e-5)
    eye = np.broadcast_to(np.eye(count), (2, count, count))
    for side in (found.left, found.right):
        np.testing.assert_allclose(jnp.swapaxes(side, -1, -2) @ side, eye, atol=1e-5)


def test_an_adapter_has_the_spectrum_of_the_merged_model(params):
    after = tuned(params)
    thin, thick = spectrum.spectra(params, after), spectrum.spectra(params, merge(after))
    assert list(thin) == list(thick) and len(thin) == 3  # the others did not change
    for path, one in thin.items():
        assert one.values.shape[-1] == 3
        np.testing.assert_allclose(one.values, thick[path].values[..., :3], rtol=1e-4)
        np.testing.assert_allclose(thick[path].values[..., 3:] / one.values[..., :1], 0, atol=1e-5)
    removed = spectrum.spectra(lora.remove(after), after)
    np.testing.assert_array_equal(removed["embed/table"].values, thin["embed/table"].values)


def test_a_lora_that_stands_on_another_matrix_is_compared_densely(params):
    """As a residual base is: a and b alone are not the update."""
    after = tuned(params, "embed/table")
    table = after["embed"]["table"]
    after["embed"]["table"] = table.replace(base=table.base - table.scale * table.a @ table.b)
    found = spectrum.spectra(params, after, "embed/table")
    assert all(one.values.max() < 1e-5 for one in found.values())


def test_models_that_do_not_belong_together_are_named(params):
    wider = decoder.Decoder(llama(40, 3, 16, 4, 2, 32, tied=True))
    other = decoder.init(wider, jax.random.key(9))
    with pytest.raises(
        ValueError, match=r"ffn/down/kernel is \[3, 24, 16\] before .* \[3, 32, 16\]"
    ):
        spectrum.spectra(params, other)
    assert spectrum.spectra(params, other, r".*/q/kernel")  # the others need not fit
    headed = {**params, "head": {"kernel": jnp.ones((16, 40))}}
    with pytest.raises(ValueError, match="only the model after the update has head/kernel"):
        spectrum.spectra(params, headed)
    with pytest.raises(ValueError, match="only the model before the update has head/kernel"):
        spectrum.spectra(headed, params)
    with pytest.raises(RuleError, match="matches none"):
        spectrum.spectra(params, params, r".*/query/kernel")
    with pytest.raises(ValueError, match=r"embed/table: the update is not finite"):
        broken = params["embed"]["table"].at[3, 2].set(jnp.nan)
        spectrum.spectra(params, {**params, "embed": {"table": broken}})
    assert spectrum.spectra(params, params) == {}


def test_effective_and_stable_rank_by_hand():
    equal = jnp.array([[2.0, 2.0, 2.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(spectrum.effective_rank(equal), [3, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(spectrum.stable_rank(equal), [3, 1, 0], rtol=1e-6)
    # p = 1/2, 1/4, 1/4: entropy 1.5 ln 2; squares 16 + 4 + 4 over 16.
    two_to_one = jnp.array([4.0, 2.0, 2.0])
    assert spectrum.effective_rank(two_to_one) == pytest.approx(2**1.5)
    assert spectrum.stable_rank(two_to_one) == pytest.approx(1.5)


def test_energy_and_the_error_of_the_best_approximation():
    values = spectrum.decompose(jnp.asarray(MATRIX)).values
    error, energy = spectrum.approximation_error(values), spectrum.energy(values)
    u, s, vt = np.linalg.svd(MATRIX[0])
    for rank in range(5):
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        lost = np.linalg.norm(MATRIX[0] - best)
        assert error[0, rank] == pytest.approx(lost, abs=1e-5)
        assert energy[0, rank] == pytest.approx(1 - lost**2 / (16 + 4 + 1 + 0.25), abs=1e-5)
    assert energy.shape == (2, 10) and np.all(energy[:, -1] == 1)
    assert spectrum.rank_for(values, 0.9).tolist() == [2, 2]  # 20 of 21.25; 9 of 18 is too little
    assert spectrum.rank_for(values, 0.7).tolist() == [1, 2]  # 16 of 21.25
    assert spectrum.rank_for(jnp.zeros(3), 0.9) == 0 and np.isnan(spectrum.energy(jnp.zeros(3))[0])


def test_similarity_of_identical_orthogonal_and_nested_spaces():
    q = jnp.asarray(orthonormal(5, 10, 6))
    same = spectrum.subspace_similarity(q[:, :3], q[:, :3])
    np.testing.assert_allclose(same, np.ones((3, 3)), atol=1e-5)  # one holds the other
    apart = spectrum.subspace_similarity(q[:, :3], q[:, 3:])
    np.testing.assert_allclose(apart, np.zeros((3, 3)), atol=1e-5)
    # The same space by other columns: all of it agrees, its beginnings need not.
    turned = q[:, :3] @ jnp.asarray(orthonormal(6, 3, 3))
    phi = spectrum.subspace_similarity(q[:, :3], turned)
    assert phi[2, 2] == pytest.approx(1, abs=1e-5) and phi[0, 0] < 0.99
    with pytest.raises(ValueError, match="in 10 and in 8 dimensions"):
        spectrum.subspace_similarity(q, q[:8])


def test_similarity_is_the_mean_squared_cosine_of_principal_angles():
    u, v = orthonormal(7, 2, 10, 4), orthonormal(8, 2, 10, 3)
    phi = spectrum.subspace_similarity(jnp.asarray(u), jnp.asarray(v))
    assert phi.shape == (2, 4, 3)
    for i, j in ((1, 1), (2, 3), (4, 3), (4, 1)):
        for layer in range(2):
            cosines = np.linalg.svd(u[layer, :, :i].T @ v[layer, :, :j], compute_uv=False)
            assert phi[layer, i - 1, j - 1] == pytest.approx(np.mean(cosines**2), abs=1e-5)


def test_similarity_of_random_spaces():
    shape = (400, 24)
    u, v = (jnp.asarray(orthonormal(n, *shape, 6)) for n in (9, 10))
    found = spectrum.subspace_similarity(u, v).mean(0)
    for i, j in ((1, 1), (2, 5), (6, 6)):
        assert found[i - 1, j - 1] == pytest.approx(spectrum.random_similarity(i, j, 24), rel=0.15)


def test_directions_of_nothing_are_not_compared():
    """A matrix of rank 2 has no third direction, whatever the SVD returns for it."""
    found = spectrum.decompose(jnp.asarray(MATRIX))
    left = spectrum.directions(found, "in", 3)
    assert left.shape == (2, 12, 3) and not np.isnan(left[0]).any()
    assert np.isnan(left[1]).all(0).tolist() == [False, False, True]
    phi = spectrum.subspace_similarity(left, left)
    assert np.isnan(phi[1, 2]).all() and not np.isnan(phi[1, :2, :2]).any()
    zeros = spectrum.decompose(jnp.zeros((12, 9)))
    assert np.isnan(spectrum.directions(zeros, "out")).all()
    with pytest.raises(ValueError, match="'in' or 'out', not 'left'"):
        spectrum.directions(found, "left")


def test_amplification_by_hand():
    """W = diag(8, 4, 2, 1), and an update along its third and fourth axes."""
    weight = jnp.diag(jnp.array([8.0, 4.0, 2.0, 1.0]))
    one = spectrum.decompose(jnp.diag(jnp.array([0.0, 0.0, 3.0, 4.0])))
    found = spectrum.amplification(one, weight, 2)
    assert found.update == pytest.approx(5) and found.weight == pytest.approx(math.sqrt(85))
    assert found.in_update == pytest.approx(math.sqrt(5), rel=1e-5)
    assert found.in_weight == pytest.approx(math.sqrt(80), rel=1e-5)
    assert found.in_random == pytest.approx(math.sqrt(85) * 2 / 4)
    assert found.factor == pytest.approx(math.sqrt(5), rel=1e-5)
    first = spectrum.amplification(one, weight, 1)
    assert (first.update, first.in_update) == (pytest.approx(4), pytest.approx(1, rel=1e-5))
    with pytest.raises(ValueError, match=r"rank must be in 1..4, .* not 5"):
        spectrum.amplification(one, weight, 5)
    with pytest.raises(ValueError, match=r"the matrix is \[3, 4\], its update \[4, 4\]"):
        spectrum.amplification(one, weight[:3], 1)


def test_random_directions_as_drawn():
    weight = jnp.asarray(MATRIX[:1])
    u, v = orthonormal(11, 500, 12, 3), orthonormal(12, 500, 9, 3)
    drawn = np.linalg.norm(u.swapaxes(-1, -2) @ MATRIX[0] @ v, axis=(-2, -1))
    found = spectrum.amplification(spectrum.decompose(weight), weight, 3).in_random
    assert found[0] == pytest.approx(np.sqrt(np.mean(drawn**2)), rel=0.05)


def test_an_adapter_amplifies_what_its_directions_say(params):
    after = tuned(params, r".*/q/kernel", rank=2)
    path, one = next(iter(spectrum.spectra(params, after).items()))
    weight = spectrum.matrices(params)[path]
    found = spectrum.amplification(one, weight, 2)
    changed = spectrum.matrices(merge(after))[path] - weight
    np.testing.assert_allclose(found.update, jnp.linalg.norm(changed, axis=(-2, -1)), rtol=1e-4)
    np.testing.assert_allclose(found.weight, jnp.linalg.norm(weight, axis=(-2, -1)), rtol=1e-5)
