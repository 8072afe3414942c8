"""Rates by depth, written out; frozen layers bitwise; unfreezing stopped and resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from perceptron import assert_bitwise

from research.models import decoder
from research.models.families.llama import llama
from research.objectives import next_token
from research.paths import named_leaves
from research.train import depth
from research.train.loop import Training, fit
from research.train.optim import SGD, AdamW, optimizer
from research.train.partition import partition
from research.types import Source
from research.weights import lora

MODEL = decoder.Decoder(llama(32, 3, 8, 2, 2, 12, init_std=0.3))
STACK = r"stack_0/block_0/.*"


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


def two_stacks():
    """A cycle of two blocks, twice; then two layers of one block: six layers."""
    leaf = {"kernel": jnp.ones((2, 3))}
    return {
        "embed": {"table": jnp.ones((4, 3))},
        "stack_0": {"block_0": leaf, "block_1": leaf},
        "stack_1": {"block_0": leaf},
        "final_norm": {"scale": jnp.ones(3)},
    }


def source():
    def next_batch(state, *rest):
        rng = np.random.default_rng(state["position"])
        tokens = rng.integers(0, 32, (4, 7), np.int32)
        weights = np.full((4, 6), 1 / 24, np.float32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
        return batch, {"position": state["position"] + 1}

    return Source(lambda rng: {"position": 0}, next_batch)


def train(params, optim, steps, directory=None, source=source(), **options):
    config = Training(steps, save_every=2 if directory else None, directory=directory)
    return fit(next_token(MODEL), source, params, optim, config, **options)


def test_depths_count_layers_across_stacks_and_cycles():
    assert depth.depths(two_stacks()) == (
        (r"(embed|position)/.*", 0),
        (r"stack_0/block_0/.*", (1, 3)),
        (r"stack_0/block_1/.*", (2, 4)),
        (r"stack_1/block_0/.*", (5, 6)),
        (r".*", 7),
    )
    assert depth.count(two_stacks()) == 8


def test_each_layer_steps_at_its_rate():
    """Plain descent with gradients of one: the steps are the multipliers, layer by layer."""
    tree = two_stacks()
    config = SGD(1.0, clip_norm=None, rates=depth.layerwise_decay(tree, 0.5))
    update = optimizer(config, tree)
    moves, _ = update.update(jax.tree.map(jnp.ones_like, tree), update.init(tree), tree)
    halves = {name: -leaf.reshape(leaf.shape[0], -1)[:, 0] for name, leaf in named_leaves(moves)}
    np.testing.assert_allclose(halves["embed/table"], 4 * [1 / 128])
    np.testing.assert_allclose(halves["stack_0/block_0/kernel"], [1 / 64, 1 / 16])
    np.testing.assert_allclose(halves["stack_0/block_1/kernel"], [1 / 32, 1 / 8])
    np.testing.assert_allclose(halves["stack_1/block_0/kernel"], [1 / 4, 1 / 2])
    np.testing.assert_allclose(halves["final_norm/scale"], 3 * [1.0])


def test_ulmfit_is_a_factor_of_2_6_from_layer_to_layer(params):
    rates = dict(depth.layerwise_decay(params, depth.ULMFIT))
    np.testing.assert_allclose(rates[STACK], [2.6**-3, 2.6**-2, 2.6**-1])
    assert rates[".*"] == 1


@pytest.mark.parametrize(
    "rates",
    [
        lambda p: depth.layerwise_decay(p, 1.0),
        lambda p: depth.frozen_below(p, 0),
        lambda p: depth.gradual_unfreezing(p, 0),
    ],
    ids=["decay 1", "frozen below 0", "unfrozen at once"],
)
def test_the_limits_are_plain_training(params, rates):
    plain = train(params, AdamW(0.01), 3).params
    assert_bitwise(train(params, AdamW(0.01, rates=rates(params)), 3).params, plain)


def test_what_is_frozen_below_a_depth_stays_bitwise(params):
    rates = depth.frozen_below(params, 3)
    assert rates == ((r"(embed|position)/.*", None), (STACK, (0.0, 0.0, 1.0)), (r".*", 1.0))
    fitted = train(params, AdamW(0.01, weight_decay=0.5, rates=rates), 3)
    before, after = dict(named_leaves(params)), dict(named_leaves(fitted.params))
    for name, leaf in after.items():
        moved = ~np.all(np.asarray(leaf == before[name]).reshape(leaf.shape[0], -1), axis=1)
        if name.startswith("stack"):
            assert moved.tolist() == [False, False, True], name
        else:
            assert moved.any() == (not name.startswith("embed")), name


def test_layers_begin_to_move_at_their_step(params):
    optim = AdamW(0.01, rates=depth.gradual_unfreezing(params, 2))
    update = optimizer(optim, params)
    state, began = update.init(params), {}
    for step in range(9):
        grads = jax.tree.map(jnp.ones_like, params)
        moves, state = update.update(grads, state, params)
        at = {"embed": moves["embed"]["table"], "norm": moves["final_norm"]["scale"]}
        kernels = moves["stack_0"]["block_0"]["ffn"]["up"]["kernel"]
        for name, move in (at | {f"layer {n + 1}": kernels[n] for n in range(3)}).items():
            if np.any(move):
                began.setdefault(name, step)
    assert began == {"norm": 0, "layer 3": 2, "layer 2": 4, "layer 1": 6, "embed": 8}


def test_unfreezing_goes_on_bitwise_after_a_stop(params, tmp_path):
    """Stopped at step 5, with the checkpoint of step 4: between two unfreezings of three steps."""
    rates = depth.gradual_unfreezing(params, 3, depth.decayed(5, 0.5))
    optim, inner = AdamW(0.01, rates=rates), source()

    class Stop(Exception):
        pass

    def stopping(state, *rest):
        if state["position"] == 5:
            raise Stop
        return inner.next(state, *rest)

    with pytest.raises(Stop):
        train(params, optim, 10, tmp_path, Source(inner.init, stopping))
    resumed = train(params, optim, 10, tmp_path)
    whole = train(params, optim, 10)
    assert_bitwise(resumed.state, whole.state)
    assert int(optax.tree.get(resumed.state.opt_state, "learning_rate").size) == 1
    first = params["stack_0"]["block_0"]["attention"]["q"]["kernel"][0]
    assert np.any(whole.params["stack_0"]["block_0"]["attention"]["q"]["kernel"][0] != first)
    assert_bitwise(whole.params["embed"], params["embed"])  # would begin at step 12


def test_another_unfreezing_is_another_run(params, tmp_path):
    train(params, AdamW(rates=depth.gradual_unfreezing(params, 2)), 2, tmp_path)
    with pytest.raises(ValueError, match=r"optimizer.rates"):
        train(params, AdamW(rates=depth.gradual_unfreezing(params, 3)), 2, tmp_path)


def test_adapters_have_the_depth_of_their_layer(params, key):
    tuned = lora.add(params, r".*/q/kernel", key, rank=2)
    trainable, _ = partition(tuned, lora.TRAINABLE)
    rates = depth.layerwise_decay(trainable, 0.5)
    assert rates == ((STACK, (1 / 8, 1 / 4, 1 / 2)),)
    optimizer(AdamW(rates=rates), trainable)


def test_refusals(params):
    with pytest.raises(ValueError, match=r"stack_0/0/block_0/.*layers stacked"):
        depth.count(decoder.unstack(params))
    with pytest.raises(ValueError, match=r"expected 5 multipliers.*got 2"):
        depth.by_depth(params, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"in 0\.\.4, got 5"):
        depth.frozen_below(params, 5)
    with pytest.raises(ValueError, match="more than 0, got 0"):
        depth.layerwise_decay(params, 0.0)
    with pytest.raises(ValueError, match="at least 0 steps"):
        depth.gradual_unfreezing(params, -1)
    short = SGD(rates=((STACK, depth.Unfreezing((0, 1))), (r".*", 1.0)))
    with pytest.raises(ValueError, match=r"rate of stack_0.*\(2,\).*\(3, "):
        optimizer(short, params)
