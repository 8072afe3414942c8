"""PiSSA, OLoRA and LoRA+ against peft's numbers; what a changed base means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft_kin
import pytest

from research import hub
from research.hub.checkpoint import CheckpointError
from research.paths import named_leaves
from research.train.optim import SGD, optimizer
from research.train.partition import partition
from research.weights import base, lora, lora_init, merge

INITIALS = {"pissa": lora_init.pissa, "olora": lora_init.olora}
# A float32 SVD gives singular vectors to about the rounding over the gaps between singular values.
TOLERANCE = {"pissa": 1e-4, "olora": 1e-5}
HOW = {"rank": 4, "alpha": 8}


def nodes_of(tree):
    return {
        path: node
        for path, node in named_leaves(tree, is_leaf=base.is_weight)
        if base.is_weight(node)
    }


@pytest.mark.parametrize("case", INITIALS)
def test_factors_base_and_gradients_equal_peft_up_to_signs(case, key):
    start = lora.add(peft_kin.BASE.params, peft_kin.LINEAR, key, **HOW, initial=INITIALS[case])
    grads, logits = peft_kin.gradients(start)
    peft_kin.check_logits(case, logits)
    assert len(nodes_of(start)) == 2
    for path, w in nodes_of(start).items():
        theirs = peft_kin.factors(case, "param", path)
        sign = np.sign((w.a * theirs["a"]).sum(axis=-2))
        peft_kin.close(w.a * sign[:, None, :], theirs["a"], path, TOLERANCE[case])
        peft_kin.close(w.b * sign[:, :, None], theirs["b"], path, TOLERANCE[case])
        peft_kin.close(w.base, peft_kin.tensor(case, "base", path, "base_layer.weight"), path)
        grad, theirs = nodes_of(grads)[path], peft_kin.factors(case, "grad", path)
        assert np.abs(theirs["a"]).max() > 0.01 and np.abs(theirs["b"]).max() > 0.01
        peft_kin.close(grad.a * sign[:, None, :], theirs["a"], path, TOLERANCE[case])
        peft_kin.close(grad.b * sign[:, :, None], theirs["b"], path, TOLERANCE[case])


@pytest.mark.parametrize("initial", [*INITIALS.values(), lora_init.FastPissa(2)])
def test_the_function_is_the_same_and_the_base_is_not(initial, key):
    params = {"embed": {"table": jax.random.normal(key, (9, 6))}}
    w = lora.add(params, "embed/table", key, rank=3, alpha=5, initial=initial)["embed"]["table"]
    np.testing.assert_allclose(w.dense(), params["embed"]["table"], atol=2e-6)
    assert np.abs(w.base - params["embed"]["table"]).max() > 0.1
    assert w.residual and w.a.shape == (9, 3) and w.b.shape == (3, 6)


def test_olora_is_orthonormal_on_the_side_of_the_outputs(key):
    params = {"kernel": jax.random.normal(key, (2, 9, 6))}
    w = lora.add({"x": params}, "x/kernel", key, rank=3, initial=lora_init.olora)["x"]["kernel"]
    np.testing.assert_allclose(w.b @ w.b.mT, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-6)


def test_fast_pissa_finds_the_singular_values_in_enough_iterations(key):
    matrix = jax.random.normal(key, (40, 30))
    exact = np.linalg.svd(matrix, compute_uv=False)

    def found(iterations):
        initial = lora_init.FastPissa(iterations, spare=4)
        _, a, b = initial("x/kernel", matrix, key, 3, 1.0)
        return np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=1)

    np.testing.assert_allclose(found(30), exact[:3], rtol=1e-4)
    assert np.abs(found(0) - exact[:3]).max() > 0.1


def test_gaussian_has_deviation_one_over_the_rank_and_b_zero(key):
    matrix = jnp.zeros((400, 60))
    same, a, b = lora_init.gaussian("x/kernel", matrix, key, 50, 1.0)
    assert same is matrix and not np.any(b)
    np.testing.assert_allclose([a.mean(), a.std() * 50], [0, 1], atol=0.02)
    _, a, b = lora_init.gaussian("x/table", matrix, key, 50, 1.0)
    assert not np.any(a) and np.all(b)


def test_bad_ranks_and_bases(key):
    params = {"x": {"kernel": jax.random.normal(key, (4, 3))}}
    with pytest.raises(ValueError, match=r"PiSSA .* at most 3 for x/kernel \(4, 3\), not 4"):
        lora.add(params, "x/kernel", key, rank=4, initial=lora_init.pissa)
    inside = lora.add(params, "x/kernel", key, rank=2)
    with pytest.raises(ValueError, match="x/kernel is a LoRA"):
        lora.add(inside, "x/kernel", key, rank=2, initial=lora_init.olora)


def test_a_residual_base_is_not_given_back_but_on_the_original_it_is(key, tmp_path):
    original = peft_kin.BASE.params
    start = lora.add(original, peft_kin.LINEAR, key, **HOW, initial=lora_init.pissa)
    tuned = jax.tree.map(
        lambda w: w.replace(a=w.a * 1.1, b=w.b - 0.2) if base.is_weight(w) else w,
        start,
        is_leaf=base.is_weight,
    )
    with pytest.raises(ValueError, match=r"base of stack_0/.*kernel is only what"):
        lora.remove(tuned)
    model = dataclasses.replace(peft_kin.BASE, params=tuned)
    with pytest.raises(CheckpointError, match=r"stack_0/.*kernel .*`lora.on_original`"):
        hub.save_adapter(tmp_path / "out", model)
    plain = lora.on_original(tuned, start, original)
    for ours, theirs in zip(
        jax.tree.leaves(merge(plain)), jax.tree.leaves(merge(tuned)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, lora.remove(plain), original)
    hub.save_adapter(tmp_path / "out", dataclasses.replace(model, params=plain))
    again = hub.load_adapter(peft_kin.BASE, tmp_path / "out")
    assert nodes_of(again.params)[peft_kin.Q].a.shape[-1] == 8


def test_a_step_of_lora_plus_equals_peft(key):
    nodes, leaves = {}, dict(named_leaves(peft_kin.BASE.params))
    for path in (peft_kin.Q, peft_kin.DOWN):
        nodes[path] = lora.LoRA(leaves[path], **peft_kin.factors("plus", "param", path), scale=2.0)
    grads, logits = peft_kin.gradients(peft_kin.put(nodes))
    peft_kin.check_logits("plus", logits)
    params, _ = partition(peft_kin.put(nodes), lora.TRAINABLE)
    grads, _ = partition(grads, lora.TRAINABLE)
    tx = optimizer(SGD(0.1, clip_norm=None, rates=lora.plus_rates(5.0)), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for path, update in nodes_of(updates).items():
        after = peft_kin.factors("plus", "after", path)
        for field in "ab":
            ours = getattr(nodes[path], field) + getattr(update, field)
            peft_kin.close(ours, after[field], f"{path}/{field}")


def kept(f, *args):
    """Shapes of what the backward pass of f keeps of the forward pass."""
    return {leaf.shape for leaf in jax.tree.leaves(jax.vjp(f, *args)[1])}


def test_lora_fa_does_not_keep_the_input(key):
    """The one thing that freezing a is for: x a [M, R] is kept, and not x [M, in]."""
    x = jax.random.normal(key, (11, 7))
    w = lora.LoRA(jnp.ones((7, 5)), jnp.ones((7, 2)), jnp.zeros((2, 5)), scale=1.0)
    both = kept(lambda a, b: base.matmul(x + 0, w.replace(a=a, b=b)), w.a, w.b)
    alone = kept(lambda b: base.matmul(x + 0, w.replace(b=b)), w.b)
    assert (11, 7) in both
    assert (11, 7) not in alone and (11, 2) in alone


def test_lora_fa_trains_b_alone(key):
    params = lora.add(peft_kin.BASE.params, r".*/kernel", key)
    trainable, _ = partition(params, lora.TRAINABLE_FA)
    names = [name for name, _ in named_leaves(trainable)]
    assert len(names) == 8 and all(name.endswith("/kernel/b") for name in names)
