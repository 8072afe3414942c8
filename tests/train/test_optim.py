import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from perceptron import factored, params

from research.paths import RuleError, named_leaves
from research.train.optim import SGD, Adafactor, AdamW, Lion, optimizer
from research.train.partition import partition
from research.train.schedules import Constant

FREE = dict(clip_norm=None)


def gradients(tree, step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


def run(config, tree, steps=4):
    update = optimizer(config, tree)
    state = update.init(tree)
    for step in range(steps):
        moves, state = update.update(gradients(tree, step), state, tree)
        tree = optax.apply_updates(tree, moves)
    return tree, state


def test_adamw_equals_a_numpy_form_of_torch():
    tree = params()
    lr, b1, b2, eps, decay = Constant(0.1, warmup_steps=3), 0.8, 0.95, 1e-6, 0.3
    got, _ = run(AdamW(lr, weight_decay=decay, b1=b1, b2=b2, eps=eps, **FREE), tree)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(tree)}
    m = {name: 0.0 for name in p}
    v = {name: 0.0 for name in p}
    for step in range(4):
        rate = 0.1 * min(1.0, (step + 1) / 3)
        for name, g in named_leaves(gradients(tree, step)):
            if "kernel" in name:  # biases and norm scales do not decay
                p[name] = p[name] * (1 - rate * decay)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            m_hat, v_hat = m[name] / (1 - b1 ** (step + 1)), v[name] / (1 - b2 ** (step + 1))
            p[name] = p[name] - rate * m_hat / (np.sqrt(v_hat) + eps)
    for name, leaf in named_leaves(got):
        np.testing.assert_allclose(leaf, p[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_lion_and_sgd_hand_numbers():
    tree = {"kernel": jnp.array([1.0, -2.0])}
    g = {"kernel": jnp.array([0.5, -3.0])}
    lion = optimizer(Lion(0.1, weight_decay=0.5, **FREE), tree)
    moves, _ = lion.update(g, lion.init(tree), tree)
    np.testing.assert_allclose(moves["kernel"], [-0.1 - 0.05, 0.1 + 0.1], rtol=1e-6)
    sgd = optimizer(SGD(0.1, momentum=0.5, **FREE), tree)
    _, state = sgd.update(g, sgd.init(tree), tree)
    moves, _ = sgd.update(g, state, tree)
    np.testing.assert_allclose(moves["kernel"], [-0.075, 0.45], rtol=1e-6)


def test_adafactor_first_step_and_its_factors():
    # The first step has beta2 = 0: v = r c / mean(r), so a gradient of rank one becomes its signs.
    g = np.outer([1.0, 2.0, -4.0], [3.0, 1.0]).astype(np.float32)
    tree = {"kernel": jnp.ones((3, 2))}
    update = optimizer(Adafactor(0.1, factored_from=2, **FREE), tree)
    moves, state = update.update({"kernel": g}, update.init(tree), tree)
    np.testing.assert_allclose(moves["kernel"], -0.1 * np.sign(g), rtol=1e-5)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.size > 1}
    assert shapes == {(3,), (2,)}


def test_clipping_scales_to_the_global_norm():
    tree = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    update = optimizer(SGD(1.0, clip_norm=1.0), tree)
    moves, _ = update.update(
        {"a": jnp.array([3.0]), "b": jnp.array([4.0])}, update.init(tree), tree
    )
    np.testing.assert_allclose([moves["a"][0], moves["b"][0]], [-0.6, -0.8], rtol=1e-5)


def test_rates_by_path_and_along_a_stacked_axis():
    tree = {"stack": {"kernel": jnp.zeros((3, 2, 2))}, "head": {"kernel": jnp.zeros((2, 2))}}
    rates = ((r"stack/.*", (0.0, 0.5, 2.0)), (r".*", 10.0))
    update = optimizer(SGD(0.1, rates=rates, **FREE), tree)
    moves, _ = update.update(jax.tree.map(jnp.ones_like, tree), update.init(tree), tree)
    np.testing.assert_allclose(moves["stack"]["kernel"][:, 1, 0], [0.0, -0.05, -0.2], rtol=1e-6)
    np.testing.assert_allclose(moves["head"]["kernel"], -1.0)
    wrong = SGD(0.1, rates=((r"stack/.*", (1.0, 2.0)), (r".*", 1.0)))
    with pytest.raises(ValueError, match=r"rate of stack/kernel.*\(2,\).*\(3, 2, 2\)"):
        optimizer(wrong, tree)


def test_a_rate_of_none_freezes_without_state():
    tree = params()
    config = AdamW(0.1, rates=((r"out/.*", None), (r".*", 1.0)))
    update = optimizer(config, tree)
    state = update.init(tree)
    assert not [name for name, _ in named_leaves(state) if "out" in name]
    moves, _ = update.update(gradients(tree, 0), state, tree)
    assert not np.any(moves["out"]["kernel"])
    assert np.all(moves["hidden"]["kernel"] != 0)


def test_no_state_for_what_partition_froze():
    trainable, _ = partition(factored(), r".*/kernel/(a|b)")
    state = optimizer(AdamW(), trainable).init(trainable)
    moments = [name for name, leaf in named_leaves(state) if leaf.ndim]
    assert len(moments) == 4 and all(name.endswith(("/a", "/b")) for name in moments)


def test_every_path_is_covered_or_an_error():
    tree = params()
    with pytest.raises(RuleError, match="no rule covers 'norm/scale'"):
        optimizer(AdamW(rates=((r"hidden/.*", 1.0), (r"out/.*", 1.0))), tree)
    with pytest.raises(RuleError, match="matches none"):
        optimizer(AdamW(decay=((r".*/weight", True), (r".*", False))), tree)


def test_a_tree_that_it_was_not_made_for_is_refused():
    with pytest.raises(ValueError, match="a leaf 'norm/scale', which"):
        optimizer(AdamW(), params()).init({"out": params()["out"], "hidden": params()["hidden"]})


def test_decay_rules_replace_the_default():
    tree = params()
    frozen_gradient = jax.tree.map(jnp.zeros_like, tree)
    config = SGD(0.5, weight_decay=0.2, decay=((r".*/scale", 0.5), (r".*", False)), **FREE)
    update = optimizer(config, tree)
    moves, _ = update.update(frozen_gradient, update.init(tree), tree)
    np.testing.assert_allclose(moves["norm"]["scale"], -0.05, rtol=1e-6)
    assert not np.any(moves["out"]["kernel"])


def test_state_is_float32_for_bfloat16_parameters():
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    for config in (AdamW(), Lion(), SGD(momentum=0.9), Adafactor()):
        state = optimizer(config, tree).init(tree)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {
            jnp.dtype("float32"),
            jnp.dtype("int32"),
        }
        stepped, _ = run(dataclasses.replace(config), tree, steps=1)
        assert {leaf.dtype for leaf in jax.tree.leaves(stepped)} == {jnp.dtype("bfloat16")}
