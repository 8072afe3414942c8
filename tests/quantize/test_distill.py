"""Distilled layers: against a loop written down again, rounding to nearest, and what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from research.evaluate.quantization import layer_states
from research.models import decoder
from research.models.families.llama import llama
from research.paths import RuleError, named_leaves
from research.quantize import distill, layerwise
from research.train.optim import SGD, AdamW
from research.weights import fake, int8
from research.weights.base import Weight, change, is_weight
from research.weights.formats import Integer
from research.weights.quantized import Quantized, quantize

MODEL = decoder.Decoder(llama(50, 2, 32, 2, 2, 64, head_size=16, max_length=64, init_std=0.4))
FORMAT = Integer(4, 16)
RULE = distill.MATRICES
ADAM = AdamW(3e-4, weight_decay=0.0, clip_norm=None)
PLAIN = SGD(0.1, clip_norm=None)


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def windows():
    return np.asarray(jax.random.randint(jax.random.key(1), (6, 24), 0, 50))


@pytest.fixture(scope="module")
def nearest(params):
    return int8.add(quantize(params, RULE, FORMAT), RULE)


@pytest.fixture(scope="module")
def made(params, windows):
    return distill.quantize(MODEL, params, windows, FORMAT, steps=24, optimizer=ADAM, batch_size=3)


def first(params, windows):
    """The first layer, its parameters, and the two batches that it reads."""
    layer = layerwise.layers_of(MODEL)[0]
    return layer, layer.own(params), layerwise.enter(MODEL, params, windows, 3)


def wrong(before, after):
    """The root mean square over tokens of |after - before| / |before|, states [L, B, T, D] -> [L]."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    each = np.square(after - before).sum(-1) / np.square(before).sum(-1)
    return np.sqrt(each.mean(axis=(1, 2)))


def test_every_layer_ends_nearer_to_the_full_models_states(params, windows, made):
    assert (made.after < made.before).all() and made.after[0] < 0.9 * made.before[0]
    full, quantized = (layer_states(MODEL, p, windows) for p in (params, made.params))
    np.testing.assert_allclose(wrong(full, quantized), made.after, rtol=1e-3)


def test_no_step_is_rounding_to_nearest(params, windows, nearest):
    met = []
    found = distill.quantize(MODEL, params, windows, FORMAT, steps=0, progress=met.append)
    assert jax.tree.structure(found.params) == jax.tree.structure(nearest)
    jax.tree.map(np.testing.assert_array_equal, found.params, nearest)
    np.testing.assert_array_equal(found.before, found.after)
    full, quantized = (layer_states(MODEL, p, windows) for p in (params, nearest))
    np.testing.assert_allclose(wrong(full, quantized), found.before, rtol=1e-3)
    assert [str(layer) for layer in met] == ["stack_0/block_0[0]", "stack_0/block_0[1]"]


@pytest.mark.parametrize("rate", [1e3, float("nan")])
def test_training_that_harms_is_not_kept(params, windows, nearest, rate):
    bad = SGD(rate, clip_norm=None)
    found = distill.quantize(MODEL, params, windows, FORMAT, steps=1, optimizer=bad)
    jax.tree.map(np.testing.assert_array_equal, found.params, nearest)
    np.testing.assert_array_equal(found.before, found.after)


def through(rounded, x):
    return x + jax.lax.stop_gradient(rounded - x)


@struct.dataclass
class Slow(Weight):
    """w [in, out] at 15 steps for each 16 numbers of a column, tokens at 255 of their own."""

    w: jax.Array

    def matmul(self, x, call):
        cut = self.w.reshape(-1, 16, self.w.shape[-1])
        step = jnp.abs(cut).max(axis=1, keepdims=True) / 7
        w = through((jnp.round(cut / step) * step).reshape(self.w.shape), self.w)
        step = jnp.abs(x).max(axis=-1, keepdims=True) / 127
        return through(jnp.round(x / step) * step, x) @ w


def test_training_is_that_of_a_slow_loop(params, windows):
    layer, own, states = first(params, windows)
    target = [x for x, _ in layerwise.run(layer, own, states)]
    student = int8.add(fake.add(own, RULE, FORMAT), RULE)
    trained = distill.train(layer, student, states, target, 3, PLAIN)
    found = {name: w for name, w in named_leaves(trained) if name.endswith("/base/base")}
    matrices = {name: w for name, w in named_leaves(own) if name.endswith("/kernel")}

    def loss(matrices, batch, target):
        slow = change(own, RULE, lambda name, w, number: Slow(matrices[name]))
        y = layerwise.apply(layer, slow, batch)
        return (((y - target) ** 2).sum(-1) / (target**2).sum(-1)).mean()

    gradient = jax.jit(jax.grad(loss))
    for number in (0, 1, 0):
        g = gradient(matrices, states[number], target[number])
        matrices = {name: w - 0.1 * g[name] for name, w in matrices.items()}
    assert len(found) == len(matrices) == 7
    for name, w in matrices.items():
        before = dict(named_leaves(own))[name]
        moved = np.abs(w - before).max()
        assert moved > 0
        np.testing.assert_allclose(found[f"{name}/base/base"], w, atol=1e-2 * moved)


def test_only_rounded_matrices_train(params, windows):
    layer, own, states = first(params, windows)
    target = [x for x, _ in layerwise.run(layer, own, states)]
    own = int8.add(own, r".*/attention/.*/kernel")  # dense matrices that are a Weight's `base`
    student = fake.add(own, r".*/ffn/.*/kernel", FORMAT)
    trained = dict(named_leaves(distill.train(layer, student, states, target, 1, ADAM)))
    moved = {n for n, w in named_leaves(student) if not np.array_equal(w, trained[n])}
    assert moved == {n for n in trained if "/ffn/" in n} and len(trained) == 9
    with pytest.raises(RuleError):
        distill.train(layer, own, states, target, 1, ADAM)


def test_what_is_left_are_few_bits_with_the_values_trained_with(params, windows, made):
    nodes = [w for w in jax.tree.leaves(made.params, is_leaf=is_weight) if is_weight(w)]
    assert len(nodes) == 7
    assert all(isinstance(w, int8.QuantizedInputs) and w.per == "token" for w in nodes)
    assert all(isinstance(w.base, Quantized) and w.base.format == FORMAT for w in nodes)
    layer, own, states = first(params, windows)
    student = int8.add(fake.add(own, RULE, FORMAT), RULE)
    target = [x for x, _ in layerwise.run(layer, own, states)]
    trained = distill.train(layer, student, states, target, 24, ADAM)
    kept = dict(named_leaves(layer.own(made.params), is_leaf=is_weight))
    for name, w in named_leaves(trained, is_leaf=is_weight):
        if is_weight(w):
            np.testing.assert_array_equal(kept[name].dense(), w.dense())
            assert not np.array_equal(w.base.base, dict(named_leaves(own))[name])
    for name in ("attention_norm", "ffn_norm"):
        before, after = (p["stack_0"]["block_0"][name]["scale"] for p in (params, made.params))
        np.testing.assert_array_equal(before, after)


def test_the_papers_form_reads_the_full_models_states(params, windows, nearest):
    options = {"steps": 0, "reads_full": True, "batch_size": 6}
    found = distill.quantize(MODEL, params, windows, FORMAT, **options)
    full = layer_states(MODEL, params, windows)
    layer = layerwise.layers_of(MODEL)[1]
    inputs = layerwise.enter(MODEL, params, windows, 6)[0][1]
    y = layerwise.apply(layer, layer.own(nearest), (full[0], inputs))
    np.testing.assert_allclose(wrong(full[1:], y[None])[0], found.before[1], rtol=1e-3)
    options |= {"steps": 24, "optimizer": ADAM, "batch_size": 3}
    trained = distill.quantize(MODEL, params, windows, FORMAT, **options)
    np.testing.assert_allclose(trained.before, found.before, rtol=1e-3)
    assert (trained.after < trained.before).all()


def test_inputs_may_stay_as_they_are(params, windows):
    found = distill.quantize(MODEL, params, windows, FORMAT, per=None, steps=0).params
    jax.tree.map(np.testing.assert_array_equal, found, quantize(params, RULE, FORMAT))


def test_distances():
    y, target = jnp.asarray([[[3.0, 4.0], [1.0, 1.0]]]), jnp.asarray([[[3.0, 0.0], [2.0, 1.0]]])
    np.testing.assert_allclose(distill.squared(y, target), [[8, 0.5]])
    np.testing.assert_allclose(distill.relative(y, target), [[16 / 9, 0.2]], rtol=1e-6)


def test_bad_input(params, windows):
    def refused(error, message, model_params=params, **options):
        with pytest.raises(error, match=message):
            distill.quantize(
                MODEL, model_params, **({"windows": windows, "format": FORMAT} | options)
            )

    refused(ValueError, "0 steps a layer or more, not -1", steps=-1)
    refused(ValueError, "'token', 'tensor' or None, not 'static'", per="static")
    refused(ValueError, "at least one window", windows=windows[:0])
    refused(ValueError, r"only matrices of layers, not \['head/kernel'\]", rule=r".*/kernel")
    refused(RuleError, "nothing", rule="nothing")
    refused(ValueError, r"k/kernel \(32, 32\): groups of 24", format=Integer(4, 24), steps=0)
    again = quantize(params, RULE, FORMAT)
    refused(ValueError, "k/kernel is a Quantized already", model_params=again, steps=0)
