"""The rank allocation against peft's RankAllocator, shown the same weights and gradients; and in
training, where budgets, frozen leaves and a resumed run can be looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adalora_reference import RECORD, triplets

from research.models import decoder
from research.models.families.llama import llama
from research.objectives import next_token, with_penalty
from research.paths import named_leaves
from research.train.directory import OtherRunError
from research.train.loop import Training, fit
from research.train.optim import SGD, AdamW, Finished, optimizer
from research.train.sharding import make_mesh
from research.types import Source
from research.weights import adalora
from research.weights.adalora_allocate import Allocation, budget, highest, triplet_scores
from research.weights.base import is_weight, leaf_axes

STEPS = 10
BUDGETS = [24, 24, 17, 12, 10, 8, 8, 8, 8, 8]
FIRST = Allocation(target_rank=2, total_steps=STEPS, initial_steps=2, final_steps=2)
CASES = {
    "every": FIRST,
    "spaced": Allocation(2, STEPS, 1, 3, interval=3, beta1=0.6, beta2=0.9),
    "whole": Allocation(2, STEPS, interval=2),
}


def at(kind, step):
    """{q, v} of recorded AdaLoRAs without bases."""
    found = {name: triplets(f"{kind}.{name}") for name in "qv"}
    return {
        name: adalora.AdaLoRA(None, **{k: jnp.asarray(v[step]) for k, v in of.items()}, scale=2.0)
        for name, of in found.items()
    }


def replay(config, layers_apart=False):
    """[{q, v: E after each step}] of an allocation that is shown what peft's was shown."""
    change = apart if layers_apart else lambda tree: tree
    params = change(jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.25), at("weight", 0)))
    update = config(params)
    state, found = update.init(params), []
    one = jax.jit(update.update)
    for step in range(STEPS):
        weights, grad = change(at("weight", step)), change(at("grad", step))
        moves = jax.tree.map(jnp.subtract, weights, params)
        moves, state = one(moves, state, params, grad=grad)
        params = optax.apply_updates(params, moves)
        found.append({name: np.asarray(together(params[name])) for name in "qv"})
    return found, state


def apart(tree):
    """Each layer as a node of its own."""
    return {
        name: tuple(jax.tree.map(lambda leaf, n=n: leaf[n], w) for n in range(2))
        for name, w in tree.items()
    }


def together(node):
    return np.stack([w.e for w in node]) if isinstance(node, tuple) else node.e


@pytest.mark.parametrize("name", CASES)
def test_budgets_equal_peft(name):
    ours = [budget(CASES[name], step, 24, 8) for step in range(1, STEPS + 1)]
    assert ours == RECORD[f"budget.{name}"].tolist()


def test_budgets_of_the_reference_case():
    """Four matrices of six triplets down to two: (24 - 8) (1 - (t - 2) / 6)³ + 8."""
    assert [budget(FIRST, step, 24, 8) for step in range(1, STEPS + 1)] == BUDGETS


@pytest.mark.parametrize("name", CASES)
def test_masks_equal_peft(name):
    found, _ = replay(CASES[name])
    for step, e in enumerate(found):
        for matrix in "qv":
            expected = RECORD[f"keep.{name}.{matrix}"][step]
            np.testing.assert_array_equal(e[matrix] != 0, expected, err_msg=f"step {step + 1}")


def test_singular_values_equal_peft_and_masked_ones_are_zero():
    """Where peft really trained: what is masked is exactly 0, the rest is the optimizer's."""
    found, _ = replay(FIRST)
    for step, e in enumerate(found):
        for matrix in "qv":
            expected = RECORD[f"masked.{matrix}.e"][step]
            np.testing.assert_array_equal(e[matrix] == 0, expected == 0)
            np.testing.assert_allclose(e[matrix], expected, rtol=0, atol=1e-6)


def test_layers_of_a_stacked_leaf_are_separate_matrices():
    stacked, _ = replay(FIRST)
    separate, _ = replay(FIRST, layers_apart=True)
    for one, other in zip(stacked, separate, strict=True):
        for matrix in "qv":
            np.testing.assert_array_equal(one[matrix], other[matrix])
    counts = np.concatenate([np.count_nonzero(stacked[-1][matrix], axis=-1) for matrix in "qv"])
    assert counts.sum() == 8 and len(set(counts.tolist())) > 1


def test_importance_stands_still_in_the_final_phase_and_tinit_masks_nothing():
    _, whole = replay(FIRST)
    early = Allocation(2, STEPS, 2, 7)  # F = 3: averages end with step 2
    _, state = replay(early)
    weights = [np.abs(at("weight", t)["q"].a * at("grad", t)["q"].a) for t in range(2)]
    mean = 0.15 * (0.85 * weights[0] + weights[1])
    np.testing.assert_allclose(state.sensitivity["q"].a, mean, rtol=1e-5)
    assert np.abs(state.sensitivity["q"].a - whole.sensitivity["q"].a).max() > 0
    assert int(state.count) == STEPS


def test_scores_by_hand():
    ones = adalora.AdaLoRA(None, jnp.ones((3, 2)), jnp.ones(2), jnp.ones((2, 4)), 1.0)
    unc = adalora.AdaLoRA(
        None,
        jnp.array([[3.0, 0], [0, 0], [0, 6]]),
        jnp.array([10.0, 20]),
        jnp.array([[4.0, 0, 0, 0], [8, 8, 0, 0]]),
        1.0,
    )
    np.testing.assert_allclose(triplet_scores(ones, unc), [10 + 1 + 1, 20 + 2 + 4])


def test_highest_over_all_matrices_masks_ties():
    scores = {"x": jnp.array([[1.0, 5], [2, 2]]), "y": jnp.array([4.0, 0, 3])}
    keep = highest(scores, 3)
    assert keep["x"].tolist() == [[False, True], [False, False]]
    assert keep["y"].tolist() == [True, False, True]
    tied = highest(scores, 4)  # the fourth and fifth tie: neither stays
    assert tied["x"].tolist() == [[False, True], [False, False]]
    assert np.all(jax.tree.leaves(highest({"y": scores["y"]}, 3))[0])


# In training

MODEL = decoder.Decoder(llama(64, 2, 16, 4, 2, 32, max_length=32))
OPTIMIZER = Finished(AdamW(0.02, weight_decay=0.1), FIRST)


def adapted():
    tree = decoder.init(MODEL, jax.random.key(0))
    return adalora.add(tree, r".*/(q|v)/kernel", jax.random.key(1), rank=6)


def next_batch(state, params, context, rng, last_metrics):
    tokens = np.random.default_rng(state).integers(1, 64, size=(8, 12)).astype(np.int32)
    weights = np.full((8, 11), 1 / 88, np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}, state + 1


def train(steps=STEPS, directory=None, optimizer=OPTIMIZER, seen=None, mesh=None):
    objective = with_penalty(next_token(MODEL), adalora.orthogonality())
    options = {"mesh": mesh, "names": leaf_axes(adapted(), decoder.axes(MODEL))} if mesh else {}

    def evaluate(params):
        total = int(sum(np.sum(n) for n in adalora.ranks(params).values()))
        seen.append(total)
        return {"triplets": total}

    return fit(
        objective,
        Source(lambda rng: 0, next_batch),
        adapted(),
        optimizer,
        Training(steps, log_every=None, eval_every=1, directory=directory),
        rule=adalora.TRAINABLE,
        evaluate=None if seen is None else evaluate,
        **options,
    )


@pytest.fixture(scope="module")
def whole():
    seen = []
    return train(seen=seen), seen


def test_triplets_left_after_each_step_are_the_budget(whole):
    fitted, seen = whole
    assert seen == BUDGETS
    keep = fitted.state.opt_state[1].keep
    assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(keep)) == 8
    assert sum(int(n.sum()) for n in adalora.ranks(fitted.params).values()) == 8


def test_only_triplets_move_and_only_they_have_state(whole):
    before = dict(named_leaves(adapted()))
    for name, leaf in named_leaves(whole[0].params):
        moved = not np.array_equal(leaf, before[name])
        assert moved == name.endswith(("/kernel/a", "/kernel/e", "/kernel/b")), name
    state = whole[0].state.opt_state[1]
    ends = ("kernel/a", "kernel/e", "kernel/b")
    assert all(name.endswith(ends) for name, _ in named_leaves(state.uncertainty))
    assert len(named_leaves(state.uncertainty)) == 6


@pytest.mark.parametrize("stop", [5, 9], ids=["while pruning", "final phase"])
def test_stopped_and_resumed_is_bitwise_the_same_and_another_allocation_is_refused(
    whole, stop, tmp_path
):
    train(stop, tmp_path)
    resumed = train(directory=tmp_path)
    ours, theirs = (
        dict(named_leaves(state.replace(rng=jax.random.key_data(state.rng))))
        for state in (resumed.state, whole[0].state)
    )
    assert ours.keys() == theirs.keys()
    for part in ("sensitivity", "uncertainty", "keep", "count"):
        assert any(f"/{part}" in name for name in ours), part
    for name, leaf in theirs.items():
        assert np.asarray(ours[name]).tobytes() == np.asarray(leaf).tobytes(), name
    other = Finished(OPTIMIZER.optimizer, Allocation(2, STEPS, 2, 3))
    with pytest.raises(OtherRunError, match="optimizer"):
        train(directory=tmp_path, optimizer=other)


def test_a_mesh_of_all_three_axes_equals_one_device(whole):
    fitted = train(mesh=make_mesh(2, 2, 2))
    for (name, got), (_, expected) in zip(
        named_leaves(fitted.params), named_leaves(whole[0].params), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=name)
    state = fitted.state
    a, mean = (
        jax.tree.leaves(tree, is_leaf=is_weight)[0].a
        for tree in (state.trainable, state.opt_state[1].sensitivity)
    )
    assert mean.sharding == a.sharding


def test_finish_sees_the_whole_update_and_the_gradient_before_clipping():
    """A last word that puts back what the optimizer did, and notes what it was shown."""
    seen = {}

    def undo(trainable):
        def update(updates, state, params=None, *, grad, **extra):
            seen.update(updates=updates, grad=grad)
            return jax.tree.map(jnp.zeros_like, updates), state

        return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)

    tree, grad = {"kernel": jnp.array([1.0, 2])}, {"kernel": jnp.array([30.0, 40])}
    config = SGD(0.1, weight_decay=0.5, clip_norm=1.0)
    update = optimizer(Finished(config, undo), tree)
    moves, _ = update.update(grad, update.init(tree), tree, grad=grad)
    assert not np.any(moves["kernel"])
    np.testing.assert_array_equal(seen["grad"]["kernel"], [30, 40])
    np.testing.assert_allclose(seen["updates"]["kernel"], [-0.06 - 0.05, -0.08 - 0.1], rtol=1e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no step is left to prune in"):
        Allocation(2, STEPS, 6, 4)
    with pytest.raises(ValueError, match=r"beta1 must lie between 0 and 1, not 1.0"):
        Allocation(2, STEPS, beta1=1.0)
    with pytest.raises(ValueError, match="interval must be at least 1, not 0"):
        Allocation(2, STEPS, interval=0)
    node = at("weight", 0)["q"]
    with pytest.raises(ValueError, match=r"x/kernel has 6 triplets, Allocation.target_rank is 7"):
        Allocation(7, STEPS)({"x": {"kernel": node}})
    with pytest.raises(ValueError, match="x/kernel: a, e and b of an AdaLoRA must train together"):
        FIRST({"x": {"kernel": node.replace(a=None)}})
    with pytest.raises(ValueError, match="no AdaLoRA among the trained leaves"):
        FIRST({"x": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match="`grad`, the gradient"):
        FIRST({"x": node}).update({"x": node}, FIRST({"x": node}).init({"x": node}), {"x": node})
