"""References that are computed as they are needed: equal to cached ones, constant, and refused."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from judged_rows import INIT, MODEL, V, model, pairs

from research.data.source import pair_source
from research.losses.preference import dpo
from research.losses.token_preference import tdpo2
from research.objectives import answer_log_probs, answer_tokens, preference, token_preference
from research.objectives.reference import in_context, without_adapter
from research.train.loop import Training, fit
from research.weights import lora
from research.weights.base import is_weight


@pytest.fixture(scope="module")
def base():
    return INIT(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def adapted(base):
    """With a LoRA that already says something."""
    params = lora.add(base, r"stack_0/.*/kernel", jax.random.key(2), 2)

    def moved(leaf):
        if not isinstance(leaf, lora.LoRA):
            return leaf
        return leaf.replace(b=jax.random.normal(jax.random.key(3), leaf.b.shape))

    return jax.tree.map(moved, params, is_leaf=is_weight)


def found(objective, params, context, batch):
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return run(params, context, batch, None)


def test_live_and_cached_references_are_equal_in_value_and_gradient(base, adapted):
    batch = pairs()
    cached = batch | {"reference": answer_log_probs(MODEL, base, batch)[0]}
    wanted = found(preference(MODEL, dpo), adapted, None, cached)
    assert abs(float(wanted[0][0]) - np.log(2)) > 1e-3
    given = found(
        preference(MODEL, dpo, reference=in_context()), adapted, {"reference": base}, batch
    )
    without = found(preference(MODEL, dpo, reference=without_adapter), adapted, None, batch)
    for other in (given, without):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other, wanted
        )


def test_the_reference_stays_what_it_was_over_steps(base, adapted):
    table = {name: x for name, x in pairs(4).items() if name != "pair_weights"}
    before, _ = answer_log_probs(MODEL, base, table)
    fitted = fit(
        preference(MODEL, dpo, reference=without_adapter),
        pair_source(table, 2, 0),
        adapted,
        optax.sgd(1.0),
        Training(3),
        rule=((lora.TRAINABLE, True), (r".*", False)),
    )
    after, _ = answer_log_probs(MODEL, without_adapter(MODEL, fitted.params, None)[1], table)
    np.testing.assert_array_equal(after, before)
    moved, _ = answer_log_probs(MODEL, fitted.params, table)
    start, _ = answer_log_probs(MODEL, adapted, table)
    assert np.abs(moved - start).max() > 1e-3


def test_references_that_cannot_be(base):
    batch, larger = pairs(), model(V + 1)
    objective = preference(MODEL, dpo, reference=in_context(larger))
    context = {"reference": INIT(larger, jax.random.key(0))}
    with pytest.raises(
        ValueError, match=f"a vocabulary of {V + 1} tokens and the policy one of {V}"
    ):
        objective(base, context, batch, None)
    with pytest.raises(ValueError, match="the reference would be the policy itself"):
        preference(MODEL, dpo, reference=without_adapter)(base, None, batch, None)


@pytest.mark.parametrize("reference", ["without_adapter", "in_context"])
def test_token_losses_have_the_same_references(base, adapted, reference):
    """TDPO2 at α = 0 is DPO, whose reference is cached here; at 1 it looks at whole distributions."""
    batch = pairs()
    cached = batch | {"reference": answer_log_probs(MODEL, base, batch)[0]}
    wanted = found(preference(MODEL, dpo), adapted, None, cached)
    live = without_adapter if reference == "without_adapter" else in_context()
    run = lambda alpha: found(  # noqa: E731
        token_preference(MODEL, partial(tdpo2, alpha=alpha), live),
        adapted,
        {"reference": base},
        batch,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(0.0), wanted
    )
    tokens = answer_tokens(MODEL, adapted, {"reference": base}, batch, None, None, live)
    logits = [
        MODEL.apply({"params": p}, batch["tokens"], batch["positions"], batch["segment_ids"])
        for p in (adapted, base)
    ]
    policy, theirs = (jax.nn.log_softmax(x) for x in logits)
    divergence = (np.exp(theirs) * (theirs - policy)).sum(-1) * (tokens.answers != 0)
    np.testing.assert_allclose(tokens.divergence, divergence, atol=1e-4)
    assert abs(float(run(1.0)[0][0]) - float(wanted[0][0])) > 1e-3
