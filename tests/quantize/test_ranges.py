"""Ranges of static activation scales against stored activations and slow forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import built, windows

from research.models.families.llama import llama
from research.quantize import calibrate, measures, ranges
from research.quantize.ranges import Histogram, Percentile

DOWN, HEAD = "stack_0/block_0/ffn/down/kernel", "head/kernel"
RULE = f"{DOWN}|{HEAD}"


@pytest.fixture(scope="module")
def stored():
    """(histograms, magnitudes {path: [..., numbers]}) of the same inputs."""
    model, params = built(llama(50, 2, 24, 3, 3, 32, head_size=8))
    found = ranges.histograms(model, params, windows(), RULE, batch_size=4)
    inputs = calibrate.measure(
        model, params, windows(), RULE, measures.Sample(72), measures.join, batch_size=6
    )
    return found, {n: np.abs(x).reshape(*x.shape[:-2], -1) for n, x in inputs.items()}


def histogram(x, bins=2048):
    return np.histogram(x, bins, (0, x.max()))[0].astype(np.float64)


def test_histograms_are_numpys_and_add_up_over_batches(stored):
    found, magnitudes = stored
    assert found[DOWN].counts.shape == (2, 2048) and found[HEAD].counts.shape == (2048,)
    for layer in range(2):
        x = magnitudes[DOWN][layer]
        assert found[DOWN].counts[layer].sum() == x.size == 72 * 32
        # float32's edges put a few numbers into the neighbour bin
        np.testing.assert_allclose(
            np.cumsum(found[DOWN].counts[layer]), np.cumsum(histogram(x)), atol=3
        )
    one = measures.Histogram(4)(jnp.array([[0.0, -0.9], [2.5, 4.0]]), jnp.float32(4))
    assert one.tolist() == [2, 0, 1, 1]
    assert measures.Histogram(4)(jnp.zeros((3, 2)), jnp.float32(0)).tolist() == [6, 0, 0, 0]
    total = measures.count(jnp.float32(2**24), jnp.float32(1))
    assert total == 2**24 + 1


def test_absmax_is_exact(stored):
    found, magnitudes = stored
    for bits in (8, 4):
        steps = ranges.scales(found, ranges.absmax, bits)
        for name, x in magnitudes.items():
            np.testing.assert_allclose(steps[name], x.max(-1) / (2 ** (bits - 1) - 1), rtol=1e-5)


@pytest.mark.parametrize("percent", [50, 99, 99.9, 100])
def test_percentiles_are_numpys_within_a_bin(stored, percent):
    found, magnitudes = stored
    steps = ranges.scales(found, Percentile(percent))
    for name, x in magnitudes.items():
        at = len(x.T) * percent / 100
        near = np.sort(x, -1)[..., [max(int(at) - 2, 0), min(int(at) + 2, len(x.T) - 1)]]
        bin_ = x.max(-1) / 2048
        found_range = np.asarray(steps[name]) * 127
        assert (found_range >= near[..., 0] - 1.01 * bin_).all()
        assert (found_range <= near[..., 1] + 1.01 * bin_).all()
        if percent < 99.5:  # where many numbers are near
            np.testing.assert_allclose(found_range, np.percentile(x, percent, -1), rtol=0.03)


def test_percentile_by_hand():
    counts = np.array([6.0, 0, 2, 2])
    assert [Percentile(p)(counts, 8) for p in (30, 60, 70, 80, 100)] == [0.5, 1, 2.5, 3, 4]


@pytest.mark.parametrize("bits", [8, 4])
def test_mse_is_that_of_every_range_tried_on_the_stored_numbers(stored, bits):
    found, magnitudes = stored
    most = 2 ** (bits - 1) - 1
    steps = ranges.scales(found, ranges.mse, bits)

    def error(x, step):
        return np.square(np.clip(np.round(x / step), -most, most) * step - x).sum()

    for name, x in magnitudes.items():
        for numbers, step in zip(x.reshape(-1, x.shape[-1]), np.ravel(steps[name]), strict=True):
            tried = [error(numbers, numbers.max() * k / 256 / most) for k in range(1, 257)]
            assert error(numbers, step) <= 1.02 * min(tried)
    if bits == 4:  # few steps: clipping is worth it
        assert (np.asarray(steps[DOWN]) < 0.9 * magnitudes[DOWN].max(-1) / most).all()


def slow_divergence(counts, edge, levels):
    p = [float(n) for n in counts[:edge]]
    p[-1] += sum(counts[edge:])
    q = [0.0] * edge
    for level in range(levels):
        own = [j for j in range(edge) if j * levels // edge == level]
        filled = [j for j in own if counts[j] > 0]
        for j in filled:
            q[j] = sum(counts[i] for i in own) / len(filled)
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0 and b == 0:
            return np.inf
        if a > 0:
            total += a / sum(p) * np.log((a / sum(p)) / (b / sum(q)))
    return total


def test_divergence_is_that_of_the_definition():
    counts = histogram(np.abs(np.random.default_rng(0).normal(size=2000)), 256)
    counts[5] = counts[250:] = 0
    for edge, levels in [(128, 128), (129, 128), (200, 16), (230, 100), (256, 8)]:
        found = ranges.divergence(counts, edge, levels)
        np.testing.assert_allclose(found, slow_divergence(counts, edge, levels), atol=1e-12)
    assert ranges.divergence(counts, 250, 128) < np.inf
    assert ranges.divergence(counts, 254, 128) < np.inf  # nothing is clipped
    counts[255] = 1
    assert ranges.divergence(counts, 254, 128) == np.inf


def test_entropy_clips_an_outlier_and_nothing_of_a_uniform_distribution():
    normal = np.abs(np.random.default_rng(0).normal(size=200_000))
    with_outlier = np.append(normal, 40.0)
    found = ranges.entropy(histogram(with_outlier), 8) / 2048 * 40
    assert 3 < found < 6
    even = histogram(np.linspace(0, 1, 2048 * 100))
    assert ranges.entropy(even, 8) > 0.99 * 2048
    # In few bits the normal distribution's own tail is clipped.
    assert ranges.entropy(histogram(normal), 4) / 2048 * normal.max() < 3.7


def test_bad_input():
    with pytest.raises(ValueError, match="percent is above 0"):
        Percentile(0)
    with pytest.raises(ValueError, match="128 levels need as many bins, not 64"):
        ranges.entropy(np.ones(64), 8)
    for top in (0.0, np.nan, np.inf):
        found = {"a/kernel": Histogram(np.ones((1, 8)), np.array([top]))}
        with pytest.raises(ValueError, match="inputs of a/kernel have the largest magnitude"):
            ranges.scales(found, ranges.absmax)
