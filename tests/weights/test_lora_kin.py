"""What every kin of LoRA owes a model: the same function at first and merged, in every form of the
stack, and nothing frozen that moves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.train.optim import AdamW, optimizer
from research.train.partition import combine, partition
from research.train.sharding import make_mesh, shardings
from research.weights import base, dora, lora, lora_init, merge, vera

CONFIG = partial(llama, 24, 2, 8, 2, 2, 12, tied=True, init_std=0.3)
MODEL = decoder.Decoder(CONFIG())
REMAT = decoder.Decoder(CONFIG(remat="full"))
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
KERNELS, ALL = r".*/kernel", r".*/kernel|embed/table"
METHODS = {
    "pissa": (partial(lora.add, rank=2, alpha=6, initial=lora_init.pissa), ALL, lora.TRAINABLE),
    "lora_fa": (partial(lora.add, rank=2), KERNELS, lora.TRAINABLE_FA),
    "dora": (partial(dora.add, rank=2, alpha=6), ALL, dora.TRAINABLE),
    "vera": (partial(vera.add, rank=5), KERNELS, vera.TRAINABLE),
}
REMOVE = {"lora_fa": lora.remove, "dora": dora.remove, "vera": vera.remove}


@partial(jax.jit, static_argnames="model")
def logits(params, model=MODEL):
    return model.apply({"params": params}, TOKENS)


def loss(trainable, frozen, model=MODEL):
    return (logits(combine(trainable, frozen), model) ** 2).mean()


@pytest.fixture
def params(key):
    return decoder.init(MODEL, key)


def trained(params, key, method, steps=2):
    """(at first, after some steps), by Adam on the leaves of the method's rule."""
    add, where, rule = METHODS[method]
    start = add(params, where, key)
    trainable, frozen = partition(start, rule)
    tx = optimizer(AdamW(0.1), trainable)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        updates, state = tx.update(jax.grad(loss)(trainable, frozen), state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(steps):
        trainable, state = step(trainable, state)
    return start, combine(trainable, frozen)


@pytest.mark.parametrize("method", METHODS)
def test_it_begins_as_the_model_learns_and_merges_and_nothing_frozen_moves(params, key, method):
    start, after = trained(params, key, method)
    np.testing.assert_allclose(logits(start), logits(params), atol=1e-5)
    assert np.abs(logits(after) - logits(params)).max() > 0.05
    np.testing.assert_allclose(logits(merge(after)), logits(after), rtol=1e-5, atol=1e-5)
    names = dict(named_leaves(start))
    rule = METHODS[method][2]
    moving, _ = partition(start, rule)
    moving = {name for name, _ in named_leaves(moving)}
    for name, leaf in named_leaves(after):
        assert np.array_equal(leaf, names[name]) == (name not in moving), name
    if method in REMOVE:
        jax.tree.map(np.testing.assert_array_equal, REMOVE[method](after), params)


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_scanned_unstacked_and_rematerialised_are_one_function(params, key, method):
    _, tuned = trained(params, key, method)
    apart = decoder.unstack(tuned)
    np.testing.assert_allclose(logits(apart), logits(tuned), rtol=1e-5, atol=1e-5)
    trainable, frozen = partition(tuned, METHODS[method][2])
    grads = jax.jit(jax.grad(loss), static_argnums=2)
    want, got = (grads(trainable, frozen, model) for model in (MODEL, REMAT))
    for (name, x), (_, y) in zip(named_leaves(got), named_leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_over_a_mesh_it_is_the_same_function(params, key, method):
    _, tuned = trained(params, key, method)
    axes = base.leaf_axes(tuned, decoder.axes(MODEL))
    node = axes["stack_0"]["block_0"]["ffn"]["down"]["kernel"]
    small = ("layers", "embed")  # of what stands on the outputs
    assert node.base == ("layers", "ffn", "embed")
    assert (node.magnitude if method == "dora" else node.b) == small
    assert (node.b[1] if method == "dora" else node.d[1]) == "rank"
    mesh = make_mesh(1, 2, 2)
    placed, _ = shardings(axes, tuned, mesh)
    spread = jax.device_put(tuned, placed)
    np.testing.assert_allclose(logits(spread), logits(tuned), rtol=1e-5, atol=1e-5)
