"""Weighted sums of LoRAs against peft's add_weighted_adapter, and against plain matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuned_models import hub_model, logits, path_of, peft_numbers

from research.paths import map_named, named_leaves
from research.weights import base
from research.weights.combine import best_of_rank, combine_cat, combine_linear, combine_svd
from research.weights.lora import LoRA

SCALES = {"first": 2, "second": 0.75, "wide": 1}
COMBINATIONS = {
    "linear": (combine_linear, ["first", "second"], [0.7, -1.3], {}),
    "svd": (combine_svd, ["first", "second", "wide"], [0.5, -0.4, 1.1], {"rank": 3}),
    "cat": (combine_cat, ["first", "wide"], [0.6, -0.9], {}),
}


def factors(numbers, adapter):
    """{path: (a [L, in, R], b [L, R, out])} of what peft holds."""
    modules = {name.split(".")[2] for name in numbers if name.startswith(f"{adapter}.0.")}
    return {
        path_of(module): tuple(
            np.stack([numbers[f"{adapter}.{layer}.{module}.{k}"].T for layer in range(2)])
            for k in "AB"
        )
        for module in modules
    }


@pytest.fixture(scope="module")
def numbers():
    return peft_numbers("combine")


@pytest.fixture(scope="module")
def setting():
    return hub_model("tiny_llama/gqa")


@pytest.fixture(scope="module")
def adapters(numbers, setting):
    def tuned(name):
        found = factors(numbers, name)

        def wrap(path, w):
            return LoRA(w, *map(jnp.asarray, found[path]), SCALES[name]) if path in found else w

        return map_named(wrap, setting[1])

    return {name: tuned(name) for name in SCALES}


def nodes(params):
    named = named_leaves(params, is_leaf=base.is_weight)
    return {name: w for name, w in named if isinstance(w, LoRA)}


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_combinations_equal_peft(kind, numbers, setting, adapters):
    combine, names, weights, more = COMBINATIONS[kind]
    ours = combine([adapters[name] for name in names], weights, **more)
    theirs = factors(numbers, kind)
    assert nodes(ours).keys() == theirs.keys()
    for path, node in nodes(ours).items():
        a, b = theirs[path]
        assert (node.a.shape, node.b.shape, node.scale) == (a.shape, b.shape, 1)
        np.testing.assert_allclose(node.a @ node.b, a @ b, rtol=0, atol=1e-5)
        if kind != "svd":  # whose vectors have no sign of their own
            np.testing.assert_allclose(node.a, a, rtol=0, atol=1e-6)
            np.testing.assert_allclose(node.b, b, rtol=0, atol=1e-6)
    model, _, prompts = setting
    got = logits(model, ours, jnp.asarray(prompts[0])[None])[0]
    np.testing.assert_allclose(got, numbers[f"{kind}.logits.0"], rtol=0, atol=5e-5)


def test_the_best_product_of_a_rank_leaves_the_other_singular_values(key):
    """Eckart and Young: the error is the root of the sum of their squares."""
    a, b = (
        jax.random.normal(k, s)
        for k, s in zip(jax.random.split(key), [(2, 9, 5), (2, 5, 7)], strict=True)
    )
    whole = np.asarray(a) @ np.asarray(b)
    values = np.linalg.svd(whole, compute_uv=False)
    for rank in (1, 3, 5, 20):
        left, right = best_of_rank(a, b, rank)
        error = np.linalg.norm(whole - np.asarray(left @ right), axis=(1, 2))
        np.testing.assert_allclose(error, np.sqrt((values[:, rank:] ** 2).sum(1)), atol=1e-4)


def test_the_sum_is_exact_joined_and_with_rank_enough(adapters):
    three, weights = list(adapters.values()), [0.5, -2.0, 1.5]
    joined, svd = combine_cat(three, weights), combine_svd(three, weights, rank=14)
    for path, node in nodes(joined).items():
        parts = zip(weights, [nodes(adapter).get(path) for adapter in three], strict=True)
        deltas = [
            w * n.scale * np.asarray(n.a) @ np.asarray(n.b) for w, n in parts if n is not None
        ]
        np.testing.assert_allclose(node.a @ node.b, sum(deltas), atol=1e-4)
        np.testing.assert_allclose(nodes(svd)[path].a @ nodes(svd)[path].b, sum(deltas), atol=1e-4)


def test_linear_is_exact_for_one_adapter_of_either_sign(adapters):
    for weight in (0.3, -0.3):
        for path, node in nodes(combine_linear([adapters["first"]], [weight])).items():
            own = nodes(adapters["first"])[path]
            want = weight * own.scale * np.asarray(own.a) @ np.asarray(own.b)
            np.testing.assert_allclose(node.a @ node.b, want, atol=1e-5)


def test_what_does_not_combine(adapters):
    first, wide = adapters["first"], adapters["wide"]
    with pytest.raises(
        ValueError, match=r"attention/q/kernel: factors of ranks \[4, 6\] do not add"
    ):
        combine_linear([first, wide], [1, 1])
    with pytest.raises(ValueError, match=r"2 adapters and 1 weights"):
        combine_cat([first, wide], [1])
    with pytest.raises(ValueError, match=r"rank of at least 1 is needed, not 0"):
        combine_svd([first, wide], [1, 1], rank=0)
