"""Every adapter over every kind of few bits is one function, however the layers are run.

One model has a matrix of each kind, so that a method is compiled once a form and not once a kind. What
is compared with is the same adapter over the dequantized matrices.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.hub.quantized_gguf import FORMATS as GGUF
from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.quantize import gptq
from research.train.partition import combine, partition
from research.train.sharding import make_mesh, shard_batch, shardings
from research.weights import adalora, base, dora, lora
from research.weights.formats import Codebook, Integer
from research.weights.quantized import is_quantized, packed, quantized

CONFIG = partial(llama, 48, 2, 64, 2, 2, 64, tied=True, init_std=0.2)
MODEL, REMAT = decoder.Decoder(CONFIG()), decoder.Decoder(CONFIG(remat="full"))
TOKENS = np.random.default_rng(0).integers(0, 48, (8, 6)).astype(np.int32)
ALL = r".*/kernel|embed/table"
METHODS = {
    "lora": (lora.add, lora.TRAINABLE),
    "dora": (dora.add, dora.TRAINABLE),
    "adalora": (adalora.add, adalora.TRAINABLE),
}
BLOCK = "stack_0/block_0"
PATHS = {
    "NF4": f"{BLOCK}/attention/q/kernel",
    "NF4 double": f"{BLOCK}/ffn/down/kernel",
    "int8": f"{BLOCK}/attention/k/kernel",
    "GPTQ": f"{BLOCK}/attention/v/kernel",
    "Q4_0": f"{BLOCK}/attention/o/kernel",
    "Q4_1": f"{BLOCK}/ffn/gate/kernel",
    "Q8_0": f"{BLOCK}/ffn/up/kernel",
    "Q4_1, tied": "embed/table",
}
OURS = {
    "NF4": Codebook(group=32),
    "NF4 double": Codebook(group=32, double=True),
    "int8": Integer(8, "row"),
}
ZEROS = Integer(4, 32, "integer")


def by_gptq(w):
    """w [L, in, out] rounded for inputs some of which are larger than others."""
    size = np.exp(np.random.default_rng(1).normal(size=w.shape[-2]))
    x = size * np.random.default_rng(2).normal(size=(len(w), 256, w.shape[-2]))
    hessian = jnp.asarray(2 * x.swapaxes(1, 2) @ x / 256, jnp.float32)
    return packed(*gptq.quantize(w.mT, hessian, ZEROS), ZEROS, transposed=True)


def in_few_bits(name, w, number):
    kind = {path: kind for kind, path in PATHS.items()}[name]
    if kind == "GPTQ":
        return by_gptq(w)
    if kind in OURS:
        return quantized(name, w, OURS[kind])
    format = {known.name: format for known, format in GGUF.items()}[kind.split(",")[0]]
    node = quantized(name, w, format)  # and numbers of a group in float16, as in the file
    halves = (None if s is None else s.astype(jnp.float16) for s in (node.scale, node.zero))
    return node.replace(**dict(zip(("scale", "zero"), halves, strict=True)))


@partial(jax.jit, static_argnums=0)
def logits_and_gradients(model, trainable, frozen, tokens):
    def total(trainable):
        logits = model.apply({"params": combine(trainable, frozen)}, tokens)
        return jnp.square(logits).mean(), logits

    gradients, logits = jax.grad(total, has_aux=True)(trainable)
    return logits, gradients


def moved(params, rule):
    """`params` whose trained leaves are not where they began."""
    trainable, frozen = partition(params, rule)
    leaves, tree = jax.tree.flatten(trainable)
    rng = np.random.default_rng(3)
    leaves = [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return combine(jax.tree.unflatten(tree, leaves), frozen)


def over_dense(params):
    return jax.tree.map(lambda w: w.dense() if is_quantized(w) else w, params, is_leaf=is_quantized)


@cache
def found(method):
    """(adapted params, those on a mesh, {form: (logits, {path: gradient})})."""
    add, rule = METHODS[method]
    params = base.change(decoder.init(MODEL, jax.random.key(0)), ALL, in_few_bits)
    params = moved(add(params, ALL, jax.random.key(1), rank=2), rule)
    placed, notes = shardings(
        base.leaf_axes(params, decoder.axes(MODEL)), params, make_mesh(2, 2, 2)
    )
    assert not notes
    spread = jax.device_put(params, placed)
    rows = shard_batch({"tokens": TOKENS}, make_mesh(2, 2, 2))["tokens"]
    runs = {
        "dense": (MODEL, over_dense(params), TOKENS),
        "scan": (MODEL, params, TOKENS),
        "remat": (REMAT, params, TOKENS),
        "mesh": (MODEL, spread, rows),
    }
    forms = {}
    for form, (model, tree, tokens) in runs.items():
        logits, gradients = logits_and_gradients(model, *partition(tree, rule), tokens)
        forms[form] = np.asarray(logits), dict(named_leaves(gradients))
    return params, spread, forms


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_adapter_over_the_dequantized_matrix(method, kind):
    params, spread, forms = found(method)
    path, (logits, wanted) = PATHS[kind], forms["dense"]
    node = dict(named_leaves(params, is_leaf=base.is_weight))[path]
    assert is_quantized(node.base) and not is_quantized(node)
    whole = node.replace(base=node.base.dense())
    np.testing.assert_array_equal(base.dense(node), base.dense(whole))
    own = {name: x for name, x in wanted.items() if name.startswith(f"{path}/")}
    assert {name.rpartition("/")[2] for name in own} <= {"a", "b", "e", "magnitude"}
    assert len(own) == (2 if method == "lora" else 3)
    for form, (theirs, gradients) in forms.items():
        np.testing.assert_allclose(theirs, logits, rtol=1e-4, atol=1e-5 * np.abs(logits).max())
        for name, gradient in own.items():
            largest = np.abs(gradient).max()
            assert largest > 0
            np.testing.assert_allclose(
                gradients[name], gradient, rtol=1e-4, atol=2e-5 * largest, err_msg=f"{form} {name}"
            )
    codes = dict(named_leaves(spread, is_leaf=base.is_weight))[path].base.codes
    assert codes.addressable_shards[0].data.size == codes.size // 4  # fsdp and tensor
